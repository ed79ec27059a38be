"""Pictures of noise levels: what is drawn is what the scheduler computes."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from flux_lab.config import FLUX_DEV_SCHEDULER
from flux_lab.instruments import plots
from flux_lab.instruments.plots.schedule import shifted
from flux_lab.instruments.style import BLUE, VERMILLION
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift

LEVELS = [1.0, 0.4, 0.0]
PATHS = torch.tensor([[0.1, -0.2], [0.5, -0.4], [1.0, -1.0]])


def labelled(figure: Figure) -> bool:
    return all(axes.get_xlabel() for axes in figure.axes)


def test_shift_is_the_schedulers() -> None:
    sigmas = np.linspace(0.9, 0.1, 7)
    expected = FlowMatchEulerDiscreteScheduler(FLUX_DEV_SCHEDULER).time_shift(0.63, sigmas)
    assert np.allclose(shifted(sigmas, 0.63), expected)
    assert not np.allclose(shifted(sigmas, -0.63), expected)


def test_a_path_is_drawn_from_noise_to_picture() -> None:
    figure = plots.level_paths({"one": (LEVELS, PATHS), "two": (torch.tensor(LEVELS), PATHS)}, ylabel="value", by_end=True)
    first, second = figure.axes
    assert labelled(figure)
    assert [line.get_color() for line in first.lines] == [BLUE, VERMILLION]
    assert first.lines[1].get_ydata() == pytest.approx([-0.2, -0.4, -1.0])
    assert second.lines[0].get_xdata() == pytest.approx(LEVELS)
    assert first.xaxis_inverted()


def test_path_without_a_level_for_each_number_is_refused() -> None:
    with pytest.raises(ValueError, match="'one' has 2 levels and numbers at 3, expected as many"):
        plots.level_paths({"one": (LEVELS[:2], PATHS)}, ylabel="value")


def test_pictures_stand_on_the_line() -> None:
    figure = plots.mu_line({"small": 64, "large": 9216})
    (axes,) = figure.axes
    line, fixed, pictures = axes.lines
    assert labelled(figure)
    assert pictures.get_ydata() == pytest.approx([calculate_shift(64), calculate_shift(9216)])
    assert fixed.get_ydata() == pytest.approx([0.5, 1.15])
    assert line.get_xdata()[-1] > 9216


def test_shift_is_parallel_on_even_axes() -> None:
    figure = plots.shift_curves({"none": 0.0, "some": 0.8})
    plain, even = figure.axes
    assert labelled(figure)
    logits = [np.log(line.get_ydata() / (1 - line.get_ydata())) for line in even.lines]
    assert np.allclose(logits[1] - logits[0], 0.8)
    assert plain.lines[0].get_ydata() == pytest.approx(plain.lines[0].get_xdata())
    figure.draw_without_rendering()


def test_schedules_have_a_tick_for_each_level() -> None:
    figure = plots.schedules({"one": LEVELS, "two": torch.tensor([1.0, 0.0])})
    curve, rug = figure.axes
    assert labelled(figure)
    assert [len(line.get_ydata()) for line in curve.lines] == [3, 2]
    assert [len(each.get_segments()) for each in rug.collections] == [3, 2]


def test_convergence_draws_the_slope_of_halving() -> None:
    figure = plots.convergence({"one": {1: 0.8, 2: 0.5, 4: 0.3}, "two": {1: 0.6, 2: 0.2, 4: 0.1}})
    (axes,) = figure.axes
    assert labelled(figure)
    *curves, guide = axes.lines
    assert [line.get_label() for line in curves] == ["one", "two"]
    assert guide.get_ydata() == pytest.approx([0.8, 0.4, 0.2])
    figure.draw_without_rendering()
