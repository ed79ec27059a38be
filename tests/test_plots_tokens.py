"""Pictures of tokens: every number of a token is drawn where it belongs."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from flux_lab.instruments import plots
from flux_lab.latents import pack_latents, prepare_latent_image_ids
from flux_lab.shapes import ShapeError

LATENTS = torch.arange(1 * 5 * 6 * 8.0).reshape(1, 5, 6, 8) - 100


def drawn(axes) -> np.ma.MaskedArray:
    (image,) = axes.get_images()
    return image.get_array()


def test_packing_draws_the_token_of_pack_latents() -> None:
    token, channel = 6, 3
    figure = plots.packing(LATENTS, token=token, channel=channel)
    before, inside, after, numbers = figure.axes[:4]
    assert np.array_equal(drawn(before), LATENTS[0, channel])
    assert np.array_equal(drawn(numbers)[0], pack_latents(LATENTS)[0, token])
    # Token 6 of 3 x 4 is the patch at row 1, column 2; channel 1 stands in the mosaic beside channel 0.
    assert np.array_equal(drawn(inside)[:2, 2:4], LATENTS[0, 1, 2:4, 4:6])
    assert before.get_title() == "channel 3: patch at row 1, column 2"
    (frame,) = before.findobj(lambda artist: isinstance(artist, Rectangle) and artist.get_linewidth() > 2)
    assert frame.get_xy() == (3.5, 1.5)
    known = ~np.isnan(np.ma.filled(drawn(after), np.nan))
    assert known.sum() == 4 * (token + 1)
    assert known[2:4, 4:6].all()
    assert not known[2:4, 6:8].any()


def test_packing_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="token: there are 12, expected 0 to 11, got 12"):
        plots.packing(LATENTS, token=12)
    with pytest.raises(ValueError, match="channel: there are 5, expected 0 to 4, got -1"):
        plots.packing(LATENTS, channel=-1)
    with pytest.raises(ShapeError, match="packing: argument `latents`"):
        plots.packing(LATENTS[0])


def test_token_orders_writes_the_channels_and_colours_the_places() -> None:
    orders = {"right": [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)], "wrong": [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)]}
    (axes,) = plots.token_orders(orders, shown=3).axes
    assert [text.get_text() for text in axes.texts] == ["0", "0", "0", "0", "1", "2"]
    colors = [cell.get_facecolor() for cell in axes.patches]
    assert len(set(colors[:3])) == 3
    assert len(set(colors[3:])) == 1
    assert [label.get_text() for label in axes.get_yticklabels()] == ["right", "wrong"]


@pytest.mark.parametrize("size", [(3, 5), (20, 24)])
def test_id_maps_lay_the_ids_out_as_the_patches_lie(size) -> None:
    rows, columns = size
    figure = plots.id_maps(prepare_latent_image_ids(rows, columns), rows, columns)
    number, unused, row, column = (drawn(axes) for axes in figure.axes)
    assert number[2, 1] == 2 * columns + 1
    assert not unused.any()
    assert np.array_equal(row[:, 0], range(rows))
    assert np.array_equal(column[0], range(columns))
    assert bool(figure.axes[0].texts) == (columns <= 12)


def test_id_maps_need_a_number_for_every_patch() -> None:
    with pytest.raises(ValueError, match="ids: expected 4 x 5 = 20 tokens, got 15"):
        plots.id_maps(prepare_latent_image_ids(3, 5), 4, 5)
