"""Pictures of diffusion: what is drawn is what was given."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from flux_lab.instruments import plots


def test_timestep_strip_shows_both_rows_under_their_timesteps() -> None:
    colors = {"latents": "red", "x0": "lime"}
    state = SimpleNamespace(index=4, timestep=901, image=lambda of: Image.new("RGB", (4, 4), colors[of]))
    figure = plots.timestep_strip([state, state])
    assert [axes.get_title() for axes in figure.axes] == ["pass 5\nt = 901"] * 2 + ["", ""]
    assert [int(axes.get_images()[0].get_array()[0, 0, 0]) for axes in figure.axes] == [255, 255, 0, 0]


def test_timestep_ticks_mark_what_is_visited_twice() -> None:
    (axes,) = plots.timestep_ticks({"a": torch.tensor([981, 961, 961, 1]), "b": [1000.0, 12.5]}).axes
    segments = [(line.get_segments()[0][0][0], line.get_linewidths()[0]) for line in axes.collections]
    assert segments == [(1, 1.2), (961, 2.4), (981, 1.2), (12.5, 1.2), (1000, 1.2)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]


def test_signal_to_noise_is_the_ratio_of_powers() -> None:
    signal, noise = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.25, 0.0])
    (axes,) = plots.signal_to_noise({"straight": (signal, noise), "other": (torch.ones(2), torch.full((2,), 2.0))}).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["straight"] == ([1], [4])
    assert lines["other"] == ([0, 1], [0.25, 0.25])
    triangles = [line for line in axes.lines if line.get_marker() == "v"]
    assert [list(line.get_xdata()) for line in triangles] == [[0]]
    assert triangles[0].get_ydata()[0] == axes.get_ylim()[0]


def test_signal_to_noise_refuses_weights_of_two_lengths() -> None:
    with pytest.raises(ValueError, match=r"'a' has 2 weights of the picture and 3 of the noise"):
        plots.signal_to_noise({"a": (torch.ones(2), torch.ones(3))})
