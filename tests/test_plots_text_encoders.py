"""The pictures of the text encoders: values in their places, one scale, names that fit."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from flux_lab.instruments import plots
from flux_lab.shapes import ShapeError


def drawn(figure: Figure) -> list:
    return [image for axes in figure.axes for image in axes.get_images()]


def test_map_has_names_numbers_and_a_scale_from_zero() -> None:
    values = torch.tensor([[0.0, 0.5, 1.0], [0.25, 2.0, 0.125]])
    figure = plots.labelled_map(values, ["a", "b"], ["x", "y$", "球"], xlabel="tokens", ylabel="words", label="share", digits=2)
    axes, (image,) = figure.axes[0], drawn(figure)
    assert np.array_equal(image.get_array(), values.numpy())
    assert (image.norm.vmin, image.norm.vmax) == (0, 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y$", "▯"]
    assert [text.get_text() for text in axes.texts] == ["0.00", "0.50", "1.00", "0.25", "2.00", "0.12"]
    assert [each.get_position() for each in axes.texts][-1] == (2, 1)
    assert (axes.get_xlabel(), axes.get_ylabel(), figure.axes[1].get_ylabel()) == ("tokens", "words", "share")


def test_signed_map_is_centred() -> None:
    (image,) = drawn(plots.labelled_map(torch.tensor([[-3.0, 1.0]]), ["a"], ["x", "y"], "", "", "", signed=True))
    assert (image.norm.vmin, image.norm.vmax) == (-3, 3)


def test_map_refuses_names_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"each of \[1, 2\] rows and columns, got 1 and 3 names"):
        plots.labelled_map(torch.ones(1, 2), ["a"], ["x", "y", "z"], "", "", "")


@pytest.mark.parametrize("heads", [1, 4, 6])
def test_bias_has_a_map_for_each_head_on_one_scale(heads: int) -> None:
    bias = torch.linspace(-2, 1, heads * 15).reshape(1, heads, 3, 5)
    images = drawn(plots.position_bias(bias))
    assert len(images) == heads
    assert {(image.norm.vmin, image.norm.vmax) for image in images} == {(-2, 2)}
    assert np.array_equal(images[-1].get_array(), bias[0, -1].numpy())


def test_bias_without_heads_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"position_bias: argument `bias`: expected float \[1 heads query key\], got float32 \[3, 5\]"):
        plots.position_bias(torch.zeros(3, 5))


def test_curves_share_their_places() -> None:
    x = torch.arange(-2, 3)
    figure = plots.curves(x, {"one": x.float(), "two": 2 * x}, xlabel="distance (tokens)", ylabel="bucket", step=True)
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["one", "two"]
    assert list(lines[1].get_ydata()) == [-4, -2, 0, 2, 4]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 2
    with pytest.raises(ShapeError):
        plots.curves(x, {"short": x[1:]}, "", "")
