"""The pictures of a walk show the numbers of the walk."""

import pytest
import torch
from PIL import Image

from flux_lab.instruments import plots
from flux_lab.instruments.style import WIDTH
from flux_lab.instruments.walk import Walk

RED, GREEN = (Image.new("RGB", (12, 12), color) for color in ("red", "lime"))


def walked(places: int) -> Walk:
    tokens = torch.randn(places, 3, 4)
    return Walk(tuple(f"block {place}" for place in range(places)), tokens, tokens + 1, tokens, tokens, torch.rand(places))


def test_curves_are_those_of_the_walk():
    walk = walked(5)
    lengths, turns, distance = plots.walk_curves(walk).axes
    assert [list(line.get_ydata()) for line in lengths.lines] == [walk.norms("image").tolist(), walk.norms("text").tolist()]
    assert [list(line.get_ydata()) for line in turns.lines] == [walk.turns("image").tolist(), walk.turns("text").tolist()]
    assert list(turns.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert list(distance.lines[0].get_ydata()) == walk.distance.tolist()
    assert [label.get_text() for label in distance.get_xticklabels()] == list(walk.names)


@pytest.mark.parametrize(("places", "named"), [(20, 20), (21, 11), (58, 20)])
def test_many_blocks_are_named_less_often(places, named):
    axes = plots.walk_curves(walked(places)).axes[-1]
    assert len(axes.get_xticklabels()) == named
    assert axes.get_xticklabels()[1].get_text() == f"block {round(axes.get_xticks()[1])}"


def test_pictures_stand_in_reading_order():
    figure = plots.stop_here([RED, GREEN, GREEN], ["a", "b", "c"], across=2)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]
    first, second, third = (axes.get_position() for axes in figure.axes)
    assert first.y0 == pytest.approx(second.y0)
    assert first.y0 > third.y1
    assert first.x0 == pytest.approx(third.x0)
    assert second.x0 > first.x1
    assert figure.get_figwidth() <= WIDTH
    with pytest.raises(ValueError, match="names: expected one for each image, at least one, got 2 images and 1 names"):
        plots.stop_here([RED, GREEN], ["a"])


def test_curves_by_block():
    (axes,) = plots.curves_by_block({"a": [1.0, 2.0], "b": torch.tensor([0.5, 0.25])}, ["00", "01"], "effect").axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 2], [0.5, 0.25]]
    assert axes.get_ylabel() == "effect"
