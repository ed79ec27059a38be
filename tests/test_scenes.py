"""The world and its pictures: geometry against brute force, honest sampling, the held-out split, resumable rendering."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from flux_lab.training import raytrace, scenes, solids, world
from flux_lab.training.world import COLORS, FLOORS, MATERIALS, RELATIONS, SHAPES, Scene, SceneObject

SAMPLES = [world.sample_scene(np.random.default_rng([7, index])) for index in range(300)]
PAIRS = [scene for scene in SAMPLES if scene.relation]


def solid(shape: str, **values) -> SceneObject:
    return SceneObject(
        **({"shape": shape, "color": "red", "size": "large", "material": "matte", "x": 0.3, "y": -0.2, "turn": 0.0} | values)
    )


def holds(item: SceneObject, points: np.ndarray) -> np.ndarray:
    """Which points [3, ...] lie inside the solid, by its definition."""
    x, y, z = points[0] - item.x, points[1] - item.y, points[2]
    across, up = x * math.cos(item.turn) + y * math.sin(item.turn), y * math.cos(item.turn) - x * math.sin(item.turn)
    if item.shape == "sphere":
        return x**2 + y**2 + (z - item.half_width) ** 2 <= item.half_width**2
    if item.shape == "cube":
        return np.maximum(np.maximum(abs(across), abs(up)), abs(z - item.half_width)) <= item.half_width
    width = item.half_width * (1 - z / item.height if item.shape == "cone" else 1)
    return (x**2 + y**2 <= width**2 * (width > 0)) & (z >= 0) & (z <= item.height)


@pytest.fixture(scope="module")
def rays() -> np.ndarray:
    return raytrace.camera_rays(24).direction.reshape(3, 48 * 48)


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_meet_a_solid_where_marching_along_them_first_enters_it(shape, rays):
    item = solid(shape, turn=0.6 if shape == "cube" else 0.0)
    assert farthest_from_marching(item, item, rays) < 0.011


@pytest.mark.parametrize("shape", SHAPES)
def test_marching_notices_a_wrong_solid(shape, rays):
    assert farthest_from_marching(solid(shape), solid(shape, y=-0.18), rays) > 0.011


def farthest_from_marching(item: SceneObject, met_item: SceneObject, rays: np.ndarray) -> float:
    """The largest distance between where rays meet `met_item` and where small steps along them first enter `item`."""
    eye = np.array(world.EYE)[:, None]
    steps = np.arange(4.0, 10.0, 0.005)
    inside = holds(item, eye[..., None] + rays[..., None] * steps)
    first = np.where(inside.any(axis=1), steps[inside.argmax(axis=1)], np.inf)
    met = solids.meet(met_item, eye.astype(np.float32), rays)
    assert (np.isfinite(first) != np.isfinite(met)).mean() < 0.01
    both = np.isfinite(first) & np.isfinite(met)
    both[both] = world.EYE[2] + met[both] * rays[2, both] > 0.02
    assert both.sum() > 40
    return np.abs(first[both] - met[both]).max()


@pytest.mark.parametrize("bulge", [0.0, raytrace.BULGE])
@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_unit_vectors_that_point_out_of_the_solid(shape, bulge, rays):
    item = solid(shape, turn=0.6 if shape == "cube" else 0.0)
    met = solids.meet(item, np.array(world.EYE, np.float32)[:, None], rays)
    chosen = np.isfinite(met)
    points = np.array(world.EYE)[:, None] + rays[:, chosen] * met[chosen]
    normal = solids.normals(item, points, bulge)
    assert np.abs(np.linalg.norm(normal, axis=0) - 1).max() < 1e-4
    assert not holds(item, points + 0.02 * normal).any()
    if bulge == 0.0:
        assert holds(item, points - 0.02 * normal)[points[2] > 0.05].mean() > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_the_box_of_an_object_is_tight(shape):
    item = solid(shape, turn=0.6 if shape == "cube" else 0.0, size="small")
    met = solids.meet(item, np.array(world.EYE, np.float32)[:, None], raytrace.camera_rays(128).direction.reshape(3, 256 * 256))
    rows, columns = np.nonzero(np.isfinite(met).reshape(256, 256))
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 256
    assert np.abs(seen - np.array(world.box(item))).max() < 0.012


def test_pictures_are_bytes_of_the_asked_size_and_depend_on_their_scene_alone():
    together = scenes.render(SAMPLES[:3], size=40)
    assert together.shape == (3, 40, 40, 3)
    assert together.dtype == np.uint8
    assert np.array_equal(scenes.render(SAMPLES[1:2], size=40)[0], together[1])


def test_objects_change_nothing_outside_the_traced_region():
    scene = Scene((solid("cube", color="blue"),), "gray")
    rows, columns = raytrace.region(scene, 128)
    rays = raytrace.camera_rays(128)
    flat = raytrace.Rays(rays.direction.reshape(3, 256 * 256), rays.to_floor.reshape(256 * 256), rays.sun.reshape(3, 256 * 256))
    whole = raytrace.trace(scene, flat, raytrace.backdrop("gray", 128).reshape(3, 256 * 256)).reshape(3, 256, 256)
    picture = scenes.render([scene])[0]
    assert np.abs(raytrace.encode(whole).astype(int) - picture).max() <= 2
    assert np.array_equal(raytrace.encode(whole)[rows, columns], picture[rows, columns])


def seen_color(scene: Scene) -> np.ndarray:
    """Mean colour of the pixels of the scene's only object."""
    met = solids.meet(scene.objects[0], np.array(world.EYE, np.float32)[:, None], raytrace.camera_rays(64).direction.reshape(3, 128 * 128))
    inner = np.isfinite(met).reshape(64, 2, 64, 2).all(axis=(1, 3))
    return scenes.render([scene], size=64)[0][inner].mean(axis=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_color_is_told_from_every_other_whatever_the_material_and_the_floor(shape):
    def hue(color):
        """The colour without its white part; nothing is left of white."""
        chroma = color - color.min()
        return chroma / np.linalg.norm(chroma) if chroma.max() > 0.3 * color.max() else np.zeros(3)

    plain = {color: hue(seen_color(Scene((solid(shape, color=color),), "gray"))) for color in COLORS}
    for color, material, floor in itertools.product(COLORS, MATERIALS, FLOORS):
        seen = hue(seen_color(Scene((solid(shape, color=color, material=material),), floor)))
        assert min(plain, key=lambda name: np.linalg.norm(plain[name] - seen)) == color, (color, material, floor)


def test_sampled_scenes_are_whole_and_apart_and_differ_in_color_or_shape():
    assert {scene.floor for scene in SAMPLES} == set(FLOORS)
    for scene in SAMPLES:
        for item in scene.objects:
            assert min(world.box(item)) > world.MARGIN
            assert max(world.box(item)) < 1 - world.MARGIN
    for scene in PAIRS:
        one, two = scene.objects
        assert (one.color, one.shape) != (two.color, two.shape)
        assert math.hypot(one.x - two.x, one.y - two.y) > (one.half_width + two.half_width)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_is_plain_in_the_picture(relation):
    chosen = [scene for scene in PAIRS if scene.relation == relation]
    assert len(chosen) > 20
    for one, two in (scene.objects for scene in chosen):
        if relation in ("right of", "behind"):
            one, two = two, one
        if relation in ("left of", "right of"):
            assert world.box(one)[2] + world.GAP < world.box(two)[0]
            assert abs(one.y - two.y) < abs(one.x - two.x)
        else:
            assert one.y + 1 < two.y
            assert world.visible_share(two, one) > world.VISIBLE
            assert abs(one.x - two.x) < abs(one.y - two.y)


def test_held_out_is_the_same_for_both_ways_to_say_it_and_for_every_run():
    assert all(world.held_out(scene) == world.held_out(scene.swapped()) for scene in PAIRS)
    assert all(not world.held_out(scene) for scene in SAMPLES if scene.relation is None)
    pair = Scene((solid("cube", color="purple"), solid("sphere", color="teal")), "gray", "right of")
    assert world.combination(pair) == "teal sphere left of purple cube"
    kinds = itertools.product(COLORS, SHAPES, COLORS, SHAPES, ("left of", "in front of"))
    made = [Scene((solid(b, color=a), solid(d, color=c)), "dark", relation) for a, b, c, d, relation in kinds]
    assert sum(map(world.held_out, made)) == 389


def test_scenes_survive_json():
    for scene in SAMPLES[:20]:
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


SMALL = scenes.Settings(count=11, seed=3, size=16, captions=2, shard=4)


def contents(folder) -> tuple[bytes, bytes]:
    return (folder / "images.npy").read_bytes(), (folder / "scenes.jsonl").read_bytes()


def test_a_killed_run_goes_on_and_gives_the_same_files(tmp_path, monkeypatch):
    scenes.write_scenes(tmp_path / "whole", SMALL)
    make_shard = scenes.make_shard
    monkeypatch.setattr(scenes, "make_shard", lambda job: make_shard(job) if job[2] < 2 else pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        scenes.write_scenes(tmp_path / "killed", SMALL)
    assert not (tmp_path / "killed" / "images.npy").exists()
    made = []
    monkeypatch.setattr(scenes, "make_shard", lambda job: made.append(job[2]) or make_shard(job))
    scenes.write_scenes(tmp_path / "killed", SMALL)
    assert made == [2]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    scenes.write_scenes(tmp_path / "killed", SMALL)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="begun with"):
        scenes.write_scenes(tmp_path / "killed", dataclasses.replace(SMALL, seed=4))


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path):
    for workers in (1, 2):
        scenes.write_scenes(tmp_path / str(workers), SMALL, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize(("which", "expected"), [("train", {False}), ("held-out", {True})])
def test_folders_hold_the_scenes_they_promise(tmp_path, which, expected):
    scenes.write_scenes(tmp_path, dataclasses.replace(SMALL, which=which))
    read = scenes.read_scenes(tmp_path)
    assert {world.held_out(scene) for scene in read} == expected
    assert [len(texts) for texts in scenes.read_captions(tmp_path)] == [2] * 11
    assert np.array_equal(scenes.read_images(tmp_path), scenes.render(read, size=16))


def test_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        scenes.main(["--count", "0"])
    assert "--count" in capsys.readouterr().err
