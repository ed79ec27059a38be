"""Pictures of the rotary position embedding: what is drawn is what the module computes."""

import math

import numpy as np
import pytest
import torch

from flux_lab.instruments import plots
from flux_lab.latents import prepare_latent_image_ids
from flux_lab.rope import FluxPosEmbed, apply_rotary_emb, get_1d_rotary_pos_embed
from flux_lab.shapes import ShapeError


def drawn(axes) -> np.ma.MaskedArray:
    (image,) = axes.get_images()
    return image.get_array()


@pytest.mark.parametrize("pair", [0, 2])
def test_turning_pair_turns_as_the_module_does(pair: int) -> None:
    frequency, position = 10000.0 ** (-2 * pair / 6), 3
    plane, waves = plots.turning_pair((0.6, 0.8), frequency, position=position).axes
    x = torch.zeros(1, 1, 1, 6)
    x[..., 2 * pair : 2 * pair + 2] = torch.tensor([0.6, 0.8])
    turned = apply_rotary_emb(x, get_1d_rotary_pos_embed(6, torch.tensor([float(position)])))[0, 0, 0, 2 * pair : 2 * pair + 2]
    *_, arrow = plane.texts
    assert arrow.xy == pytest.approx(turned.tolist(), abs=1e-6)
    assert [line.get_ydata()[0] for line in waves.lines if line.get_marker() == "o"] == pytest.approx(turned.tolist(), abs=1e-6)
    assert len(plane.texts) == position + 1


def test_frequency_ladders_start_anew_on_every_axis() -> None:
    figure = plots.frequency_ladders({"small": (4, 6, 6), "large": (2, 8, 10)}, sides={"small": 8, "large": 64})
    small, large = ([line for line in panel.lines if len(line.get_xdata()) == len(line.get_ydata()) > 0][:3] for panel in figure.axes)
    assert [line.get_ydata()[0] for line in [*small, *large]] == pytest.approx([2 * math.pi] * 6)
    assert small[1].get_ydata()[1] == pytest.approx(2 * math.pi * 10000 ** (2 / 6))
    assert [list(line.get_xdata()) for line in small] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [panel.get_title() for panel in figure.axes] == ["small", "large"]


def test_rotation_table_draws_both_waves() -> None:
    cos, sin = FluxPosEmbed(10000.0, (4, 6, 6))(torch.cat([torch.zeros(5, 3), prepare_latent_image_ids(2, 4)]))
    first, second = plots.rotation_table(cos, sin, axes_dim=(4, 6, 6), length=5).axes[:2]
    assert np.array_equal(drawn(first), cos)
    assert np.array_equal(drawn(second), sin)
    assert {"unused", "row", "column"} <= {text.get_text() for text in first.texts}
    assert {"text", "image"} <= {text.get_text() for text in second.texts}
    with pytest.raises(ShapeError, match="rotation_table: argument `sin`"):
        plots.rotation_table(cos, sin[:, :8], axes_dim=(4, 6, 6), length=5)


def test_score_curves_have_a_panel_a_model_and_a_line_an_axis() -> None:
    curves = {"row": torch.tensor([1.0, 0.5]), "column": [1.0, 0.25]}
    figure = plots.score_curves({"small": curves, "large": curves}, sides={"small": 1, "large": 2})
    assert len(figure.axes) == 2
    for panel in figure.axes:
        assert [list(line.get_ydata()) for line in panel.lines[:2]] == [[1.0, 0.5], [1.0, 0.25]]


def test_place_maps_mark_a_place_and_count_from_the_middle() -> None:
    maps = {"one": torch.arange(15.0).reshape(3, 5), "two": 2 * torch.arange(15.0).reshape(3, 5)}
    one, two, bar = plots.place_maps(maps, label="score", marks={"one": (1, 2)}).axes
    assert np.array_equal(drawn(two), maps["two"])
    assert one.get_images()[0].get_clim() == two.get_images()[0].get_clim() == (0, 28)
    (mark,) = one.lines
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (2, 1)
    assert not two.lines
    assert bar.get_ylabel() == "score"
    centred = plots.place_maps(maps, label="score", centred=True).axes[0]
    assert centred.get_images()[0].get_extent() == [-2.5, 2.5, 1.5, -1.5]


def test_rounding_draws_a_curve_a_format() -> None:
    figure = plots.rounding([1, 10, 100], {"float32": torch.tensor([1e-7, 1e-6, 1e-5]), "bfloat16": torch.ones(3)}, marks={"1024 px": 64})
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [len(line.get_xdata()) for line in axes.lines] == [3, 3, 2]
