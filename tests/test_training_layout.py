"""What stands where: the second question of the flow's training."""

import numpy as np
import pytest
import torch
from conftest import randomize_

from flux_lab.config import TINY
from flux_lab.training import layout
from flux_lab.training.scenes import Settings, write_scenes
from flux_lab.training.world import Scene, SceneObject, box, sample_scene
from flux_lab.transformer import FluxTransformer2DModel

FRONT = SceneObject("sphere", "red", "large", "matte", x=0.0, y=-1.0)
BEHIND = SceneObject("cube", "blue", "large", "shiny", x=0.0, y=3.0, turn=0.4)


def counts_of(*objects: SceneObject) -> dict[str, np.ndarray]:
    found = layout.layout(Scene(objects=objects, floor="gray")).reshape(8, 8, -1)
    return dict(zip(layout.KINDS, np.moveaxis(found, 2, 0), strict=True))


def test_a_thing_is_counted_under_each_of_its_kinds_and_no_other():
    counts = counts_of(FRONT)
    named = [kind for kind, found in counts.items() if found.any()]
    assert named == ["sphere", "red", "matte", "large"]
    assert len({counts[kind].tobytes() for kind in named}) == 1
    assert counts["sphere"].max() == layout.RAYS**2


@pytest.mark.parametrize("seed", range(8))
def test_covered_patches_lie_in_the_things_box(seed):
    scene = sample_scene(np.random.default_rng(seed), count=1)
    left, upper, right, lower = (8 * edge for edge in box(scene.objects[0]))
    rows, columns = np.nonzero(layout.layout(scene).sum(axis=1).reshape(8, 8))
    assert ((rows + 1 >= upper) & (rows <= lower)).all()
    assert ((columns + 1 >= left) & (columns <= right)).all()
    assert abs(columns.mean() + 0.5 - (left + right) / 2) < 0.7  # not mirrored, not turned


def test_the_nearer_thing_hides_the_other():
    alone, both = counts_of(BEHIND), counts_of(BEHIND, FRONT)
    assert (both["sphere"] == counts_of(FRONT)["sphere"]).all()
    assert both["cube"].sum() < alone["cube"].sum()
    assert ((both["sphere"] + both["cube"]) <= layout.RAYS**2).all()
    assert all((both[kind] == counts_of(FRONT, BEHIND)[kind]).all() for kind in layout.KINDS)


def test_layouts_of_a_folder_are_written_once(tmp_path):
    write_scenes(tmp_path, Settings(count=3, size=32, captions=1))
    first = layout.scene_layouts(tmp_path)
    assert first.shape == (3, 64, len(layout.KINDS))
    assert first.dtype == torch.uint8
    (tmp_path / "scenes.jsonl").unlink()
    assert torch.equal(layout.scene_layouts(tmp_path), first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "layouts.npy", "settings.json"]


def test_the_head_reads_the_image_stream_and_teaches_the_blocks_before_it():
    transformer = randomize_(FluxTransformer2DModel(TINY)).requires_grad_(True)
    head = layout.LayoutHead(transformer)
    width = head.linear.in_features
    image, text = torch.randn(2, 64, width, requires_grad=True), torch.randn(2, 5, width, requires_grad=True)
    for hook in transformer.transformer_blocks[-1]._forward_hooks.values():
        hook(transformer.transformer_blocks[-1], (), (text, image))
    head.loss(torch.randint(0, 17, (2, 64, len(layout.KINDS)), dtype=torch.uint8)).backward()
    assert image.grad.abs().max() > 0
    assert text.grad is None


def test_a_right_answer_costs_less_than_a_wrong_one():
    head = layout.LayoutHead(FluxTransformer2DModel(TINY))
    counts = torch.zeros(1, 64, len(layout.KINDS), dtype=torch.uint8)
    head.image_stream = torch.randn(1, 64, head.linear.in_features)
    with torch.no_grad():
        head.linear.weight.zero_()
        losses = []
        for bias in (-5.0, 0.0, 5.0):
            head.linear.bias.fill_(bias)
            losses.append(head.loss(counts).item())
    assert losses[0] < losses[1] < losses[2]
