"""The attribute reader: its targets can be read back, it learns, and obedience scores only what a text states."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from flux_lab.training import reader, reader_model, scenes, world
from flux_lab.training.captions import Stated, StatedObject, everything
from flux_lab.training.obedience import score

SCENES = [world.sample_scene(np.random.default_rng([2, index])) for index in range(200)]
RED_CUBE = StatedObject("cube", "red", "small", "matte")
BLUE_BALL = StatedObject("sphere", "blue", "large", "shiny")
NOTHING = dict.fromkeys(("count", "size", "material", "color", "shape", "relation"), False)
EVERYTHING = dict.fromkeys(("count", "size", "material", "color", "shape"), True)
OTHER_PICTURES = [np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 128, 128, 3), np.float32), np.zeros((128, 128, 3), np.uint8)]
PAIR = Stated((RED_CUBE, BLUE_BALL), "left of", "gray")


def perfect_reading(targets: reader.Truth) -> reader_model.Reading:
    """What a reader without error would say: every cell answers for the object nearest to it."""
    cells = torch.arange(reader_model.CELLS)
    rows, columns = torch.meshgrid(cells, cells, indexing="ij")
    distance = (rearrange(targets.middle[..., 0], "b n -> b n 1 1") - columns) ** 2
    distance = distance + (rearrange(targets.middle[..., 1], "b n -> b n 1 1") - rows) ** 2
    nearest, owner = distance.min(dim=1)
    scene = torch.arange(len(owner))[:, None, None]
    labels = targets.labels[scene, owner]
    answers = {
        name: rearrange(F.one_hot(labels[..., index], len(values)).float(), "b r c v -> b v r c")
        for index, (name, values) in enumerate(reader_model.VALUES.items())
    }
    position = rearrange(targets.position[scene, owner], "b r c xy -> b xy r c")
    presence = torch.logit(torch.exp(-nearest / 0.9).clamp(1e-4, 1 - 1e-4))[:, None]
    return reader_model.Reading(presence, position, **answers, floor=F.one_hot(targets.floor, len(world.FLOORS)).float())


def in_reading_order(scene: world.Scene) -> world.Scene:
    return scene.swapped() if scene.relation in ("right of", "behind") else scene


def test_a_perfect_reading_gives_the_scene_back():
    read = reader_model.read_cells(perfect_reading(reader.truth(SCENES)))
    right = [each == everything(in_reading_order(scene)) for scene, each in zip(SCENES, read, strict=True)]
    assert np.mean(right) > 0.99  # two middles in neighbouring cells are read as one


def test_the_reading_test_notices_swapped_positions():
    reading = perfect_reading(reader.truth(SCENES))
    read = reader_model.read_cells(reading._replace(position=reading.position.flip(1)))
    pairs = [(scene, each) for scene, each in zip(SCENES, read, strict=True) if scene.relation]
    assert np.mean([score(everything(scene), each)["relation"] for scene, each in pairs]) < 0.7


@pytest.mark.parametrize(
    ("second", "relation"),
    [((2.0, 0.5), "left of"), ((-2.0, 0.5), "right of"), ((0.5, 2.0), "in front of"), ((0.5, -2.0), "behind")],
)
def test_relations_follow_from_places(second, relation):
    assert reader_model.relate((0.0, 0.0), second) == relation


@pytest.mark.parametrize(
    ("stated", "read", "expected"),
    [
        (
            Stated((RED_CUBE,)),
            Stated((RED_CUBE,), floor="dark"),
            EVERYTHING,
        ),
        (
            Stated((StatedObject(color="red"),), floor="gray"),
            Stated((RED_CUBE,), floor="dark"),
            {"count": True, "color": True, "floor": False},
        ),
        (Stated((StatedObject("cone"),)), Stated((), floor="dark"), {"count": False, "shape": False}),
        (Stated((StatedObject("cube"),)), PAIR, {"count": False, "shape": True}),
        (
            Stated((StatedObject("sphere", "blue"), StatedObject("cube", "red")), "right of"),
            PAIR,
            {"count": True, "color": True, "shape": True, "relation": True},
        ),
        (
            Stated((StatedObject("sphere", "blue"), StatedObject("cube", "red")), "left of"),
            PAIR,
            {"count": True, "color": True, "shape": True, "relation": False},
        ),
        (Stated((StatedObject("cube"), StatedObject("sphere")), "next to"), PAIR, {"count": True, "shape": True, "relation": True}),
        (
            Stated((StatedObject("sphere", "red"), StatedObject("cube", "blue"))),
            PAIR,
            {"count": True, "color": False, "shape": True},
        ),
        (
            PAIR,
            Stated((RED_CUBE,), floor="gray"),
            NOTHING | {"floor": True},
        ),
    ],
)
def test_only_what_is_stated_is_scored(stated, read, expected):
    assert score(stated, read) == expected


def test_a_scene_scores_full_against_itself_in_both_orders():
    for scene in SCENES:
        for way in (scene, scene.swapped()) if scene.relation else (scene,):
            assert all(score(everything(way), everything(in_reading_order(scene))).values())


def test_the_reader_learns():
    torch.manual_seed(0)
    pictures = scenes.render(SCENES[:8])
    task = reader.Task(reader.Reader(channels=(16, 24), dilations=(1,)))
    optimizer = torch.optim.AdamW(task.parameters(), lr=4e-3)
    make_batch = reader.batches(pictures, reader.truth(SCENES[:8]), 8)
    losses = []
    for step in range(60):
        results = task(**make_batch(step, torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        results["loss"].backward()
        optimizer.step()
        losses.append(sum(results[name].item() for name in (*reader_model.VALUES, "floor")))
    assert losses[0] > 5
    assert np.mean(losses[-5:]) < 2.5


def test_batches_depend_on_their_generator_alone():
    make_batch = reader.batches(scenes.render(SCENES[:9]), reader.truth(SCENES[:9]), 4)
    first, again, other = (make_batch(0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["images"], other["images"])
    assert first["images"].shape == (4, 3, 128, 128)


@pytest.mark.parametrize("images", OTHER_PICTURES)
def test_other_pictures_are_refused(images):
    with pytest.raises(ValueError, match=r"images: expected uint8 \[images, 128, 128, 3\], got"):
        reader.read_attributes(reader.Reader(), images)


def test_a_reader_is_saved_and_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training\.reader"):
        reader.load_reader(tmp_path)
    fresh = reader.Reader().eval()
    reader.save_reader(fresh, tmp_path)
    pictures = scenes.render(SCENES[:3])
    assert reader.read_attributes(reader.load_reader(tmp_path), pictures) == reader.read_attributes(fresh, pictures)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_command_trains_goes_on_and_reports(tmp_path, capsys):
    scenes.write_scenes(tmp_path / "scenes", scenes.Settings(count=6, captions=1))
    folders = ["--scenes", str(tmp_path / "scenes"), "--eval-scenes", str(tmp_path / "scenes"), "--out", str(tmp_path / "out")]
    for steps in ("1", "2"):
        reader.main([*folders, "--steps", steps, "--batch-size", "4"])
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    assert "material" in capsys.readouterr().out
    assert (tmp_path / "out" / "accuracy.json").exists()
