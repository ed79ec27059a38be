"""Pictures of the denoising loop: what is drawn is what was given."""

import pytest
import torch

from flux_lab.instruments import plots
from flux_lab.latents import pack_latents
from flux_lab.shapes import ShapeError


def test_lines_draw_the_values() -> None:
    (axes,) = plots.lines([1, 2, 4], {"a": [0.5, 1, 2], "b": torch.ones(3)}, xlabel="step", ylabel="strength").axes
    assert [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == [
        ("a", [1, 2, 4], [0.5, 1, 2]),
        ("b", [1, 2, 4], [1, 1, 1]),
    ]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_ylim()[0]) == ("step", "strength", 0)
    free = plots.lines([1, 2], {"a": [5.0, 6.0]}, xlabel="step", ylabel="strength", from_zero=False)
    assert free.axes[0].get_ylim()[0] > 4


def test_lines_refuse_a_curve_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"expected 2 values, one for each of x, got 3 for 'a'"):
        plots.lines([1, 2], {"a": [1, 2, 3]}, xlabel="step", ylabel="strength")


def test_seed_dots_show_every_seed_and_the_mean() -> None:
    (axes,) = plots.seed_dots({"one": [0.0, 1.0, 5.0], "two": torch.tensor([3.0])}, xlabel="share").axes
    dots, mean, single, same = axes.lines
    assert list(dots.get_xdata()) == [0, 1, 5]
    assert list(mean.get_xdata()) == [2, 2]
    assert (list(single.get_xdata()), list(single.get_ydata()), list(same.get_xdata())) == ([3], [1], [3, 3])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["one", "two"]
    assert axes.get_xlabel() == "share"


def test_strength_map_is_light_where_the_latents_are_strong() -> None:
    latents = torch.zeros(2, 3, 4, 6)
    latents[0, :, 1, 2] = 5.0
    drawn = plots.strength_map(pack_latents(latents), height=32, width=48)
    assert drawn.size == (48, 32)
    lightness = torch.tensor(list(drawn.convert("L").tobytes())).reshape(32, 48)
    light = (lightness > lightness.min()).nonzero()
    assert light.min(dim=0).values.tolist() == [8, 16]
    assert light.max(dim=0).values.tolist() == [15, 23]
    fainter = plots.strength_map(pack_latents(latents), height=32, width=48, highest=10.0)
    assert fainter.convert("L").getpixel((16, 8)) < drawn.convert("L").getpixel((16, 8))


def test_strength_map_refuses_unpacked_latents() -> None:
    with pytest.raises(ShapeError, match=r"strength_map: argument `tokens`.*got float32 \[1, 3, 4, 4\]"):
        plots.strength_map(torch.zeros(1, 3, 4, 4), 32, 32)
