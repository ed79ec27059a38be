"""The pictures of the conditioning show the numbers that they are given, in their places."""

import numpy as np
import pytest
import torch

from flux_lab.embeddings import get_timestep_embedding
from flux_lab.instruments import plots
from flux_lab.shapes import ShapeError

TIMES = torch.linspace(0, 1000, 7)


def pictures(figure):
    return [(axes, axes.get_images()[0].get_array()) for axes in figure.axes if axes.get_images()]


def labels(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_sinusoids_are_drawn_row_by_row():
    embedding = get_timestep_embedding(TIMES, 12)
    ((axes, drawn),) = pictures(plots.sinusoids(TIMES, embedding))
    assert np.array_equal(drawn, embedding.double().numpy())
    assert labels(axes)[0] == "0"
    assert labels(axes)[-1] == "1000"
    assert "0 to 5: cosines, 6 to 11: sines" in axes.get_xlabel()
    with pytest.raises(ShapeError, match="sinusoids: argument `embedding`"):
        plots.sinusoids(TIMES, embedding[:3])


def test_likeness_is_one_for_the_same_direction_and_zero_for_a_right_angle():
    rows = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, -3.0]])
    figure = plots.likeness({"a": rows, "b": -rows}, TIMES[:3])
    expected = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert [drawn.tolist() for _, drawn in pictures(figure)] == [expected, expected]


def test_token_maps_have_scales_of_their_own_that_leave_outliers_out():
    ones = torch.ones(20, 10)
    spiked = ones.clone()
    spiked[3, 4] = -50
    figure = plots.token_maps({"small": 0.5 * ones, "spiked": spiked, "zero": 0 * ones})
    scales = [axes.get_images()[0].get_clim() for axes, _ in pictures(figure)]
    assert scales == [(-0.5, 0.5), (-1, 1), (-1, 1)]
    assert [axes.get_title() for axes, _ in pictures(figure)] == ["small", "spiked", "zero"]


@pytest.mark.parametrize("double", [3, 5])
def test_modulation_map_numbers_the_blocks_of_each_kind(double):
    maps = {"shift": torch.rand(8, 4), "gate": torch.rand(8, 4)}
    maps["gate"][double:] = torch.nan
    figure = plots.modulation_map(maps, [1.0, 0.7, 0.4, 0.1], double=double)
    for (axes, drawn), values in zip(pictures(figure), maps.values(), strict=True):
        assert np.array_equal(np.ma.filled(drawn, np.nan), values.double().numpy(), equal_nan=True)
        assert axes.lines[0].get_ydata()[0] == double - 0.5
        assert labels(axes) == ["0", "0"]
        assert axes.get_xticklabels()[0].get_text() == "1.00"


def test_channel_map_runs_in_time_from_left_to_right():
    signals = {"shift": torch.randn(4, 6), "scale": torch.randn(4, 6)}
    figure = plots.channel_map(signals, torch.tensor([1.0, 0.7, 0.4, 0.1]), "single 03")
    for (_, drawn), values in zip(pictures(figure), signals.values(), strict=True):
        assert np.array_equal(drawn, values.T.double().numpy())
    assert figure.get_suptitle() == "single 03"


def test_rounding_errors_are_differences():
    (axes,) = plots.rounding_errors(torch.tensor([1000.0, 500.0, 3.0]), torch.tensor([1000.0, 502.0, 2.5])).axes
    assert axes.lines[0].get_ydata().tolist() == [0, 2, -0.5]
    assert axes.get_xlabel() == "step (of 3)"


def test_lengths_fall_from_noise_to_picture():
    (axes,) = plots.lengths([1.0, 0.5], {"time": torch.tensor([[3.0, 4.0], [0.0, 2.0]]), "text": torch.ones(2, 4)}).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[5, 2], [2, 2]]
    assert axes.xaxis_inverted()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["time", "text"]
