"""The pictures of attention show the numbers that they are given, in their places."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux_lab.instruments import plots
from flux_lab.instruments.style import WIDTH
from flux_lab.shapes import ShapeError

PICTURE = Image.new("RGB", (20, 16), "teal")


def drawn(axes):
    return [image.get_array() for image in axes.get_images()]


def test_attention_matrix_parts_text_from_image():
    probabilities = torch.rand(3, 9, 9)
    figure = plots.attention_matrix(probabilities, length=4)
    panels = [axes for axes in figure.axes if axes.get_title().startswith("head")]
    for axes, head in zip(panels, probabilities, strict=True):
        assert np.array_equal(drawn(axes)[0], head.double().numpy())
        assert [line.get_ydata()[0] for line in axes.lines] == [3.5, 0]
        assert axes.get_xticks().tolist() == [1.5, 6.0]
    with pytest.raises(ShapeError, match="attention_matrix: argument `probabilities`"):
        plots.attention_matrix(probabilities[None], length=4)


def test_word_map_lies_on_the_picture_with_its_largest_place_marked():
    values = torch.zeros(4, 5)
    values[1, 3] = 0.25
    figure = plots.word_maps(PICTURE, {"red": values, "cube": torch.zeros(4, 5)})
    plain, red, cube = figure.axes
    assert np.array_equal(drawn(plain)[0], np.asarray(PICTURE))
    gray, over = drawn(red)
    assert gray.shape == (16, 20, 3)
    assert np.array_equal(over, values.double().numpy())
    assert (red.get_title(), cube.get_title()) == ("red\nlargest 25 %", "cube\nlargest 0 %")
    (mark,) = red.lines
    assert (min(mark.get_xdata()), max(mark.get_xdata()), min(mark.get_ydata()), max(mark.get_ydata())) == (12, 16, 4, 8)


@pytest.mark.parametrize(("count", "across"), [(1, 6), (6, 6), (14, 7)])
def test_word_maps_are_no_wider_than_a_notebook(count, across):
    figure = plots.word_maps(PICTURE, {str(place): torch.rand(2, 2) for place in range(count)}, across=across)
    assert figure.get_figwidth() <= WIDTH + 1e-6
    assert sum(bool(axes.get_images()) for axes in figure.axes) == 1 + count


def test_shares_are_stacked():
    (axes,) = plots.attention_shares({"words": [0.25, 0.5], "image": torch.tensor([0.75, 0.5])}, ["00", "01"]).axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 25), (0, 50), (25, 75), (50, 50)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["00", "01"]
