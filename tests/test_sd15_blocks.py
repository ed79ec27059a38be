"""flux_lab.sd15.blocks equals diffusers' down, middle and up blocks, gradients too."""

import pytest
import torch
from conftest import assert_parity
from sd15_parts import LIKE_SD15, assert_same_gradients, make_unets

from flux_lab.sd15.blocks import UpBlock2D
from flux_lab.shapes import ShapeError

TEXT_DIM, TIME_DIM = LIKE_SD15.cross_attention_dim, LIKE_SD15.time_embed_dim
# Where in the model, channels that come in, and widths of the skips, oldest first.
DOWN = {"CrossAttnDownBlock2D": (1, 8), "DownBlock2D": (3, 16)}
UP = {"UpBlock2D": (0, 16, (16, 16, 16)), "CrossAttnUpBlock2D": (2, 16, (8, 12, 12)), "CrossAttnUpBlock2D, last": (3, 12, (8, 8, 8))}


def conditions(dtype=torch.float32):
    return torch.randn(2, TIME_DIM).to(dtype), torch.randn(2, 7, TEXT_DIM).to(dtype)


def run_reference(block, hidden_states, temb, text, **more):
    if type(block).__name__.startswith("CrossAttn"):
        more["encoder_hidden_states"] = text
    return block(hidden_states=hidden_states, temb=temb, **more)


@pytest.mark.parametrize("name", DOWN)
def test_down(name, dtype):
    level, channels = DOWN[name]
    ours, reference = (model.down_blocks[level] for model in make_unets(LIKE_SD15, dtype))
    assert type(ours).__name__ == type(reference).__name__ == name
    x = torch.randn(2, channels, 6, 5).to(dtype)
    temb, text = conditions(dtype)
    given = ours(x, temb, text)
    output, skips = run_reference(reference, x, temb, text)
    for ours_skip, skip in zip(given, skips, strict=True):
        assert_parity(ours_skip, skip)
    assert_parity(given[-1], output)


@pytest.mark.parametrize("name", UP)
@pytest.mark.parametrize("size", [(12, 10), (11, 9)], ids=["twice", "odd"])
def test_up(name, size, dtype):
    level, channels, widths = UP[name]
    ours, reference = (model.up_blocks[level] for model in make_unets(LIKE_SD15, dtype))
    assert type(ours).__name__ == type(reference).__name__ == name.partition(",")[0]
    x, skips = torch.randn(2, channels, 6, 5).to(dtype), tuple(torch.randn(2, width, 6, 5).to(dtype) for width in widths)
    temb, text = conditions(dtype)
    upsample_size = None if name.endswith("last") else size
    expected = run_reference(reference, x, temb, text, res_hidden_states_tuple=skips, upsample_size=upsample_size)
    assert_parity(ours(x, skips, temb, text, upsample_size), expected)


def test_middle(dtype):
    ours, reference = (model.mid_block for model in make_unets(LIKE_SD15, dtype))
    x = torch.randn(2, 16, 3, 2).to(dtype)
    temb, text = conditions(dtype)
    assert_parity(ours(x, temb, text), reference(x, temb, encoder_hidden_states=text))


def test_gradients_down():
    ours, reference = (model.down_blocks[1] for model in make_unets(LIKE_SD15))
    x, (temb, text) = torch.randn(2, 8, 6, 5), conditions()
    assert_same_gradients(ours, reference, lambda block: block(x, temb, text) if block is ours else run_reference(block, x, temb, text)[1])


def test_gradients_up():
    ours, reference = (model.up_blocks[2] for model in make_unets(LIKE_SD15))
    x, skips, (temb, text) = (
        torch.randn(2, 16, 6, 5),
        tuple(torch.randn(2, width, 6, 5) for width in UP["CrossAttnUpBlock2D"][2]),
        conditions(),
    )
    assert_same_gradients(
        ours,
        reference,
        lambda block: [
            block(x, skips, temb, text, (12, 10))
            if block is ours
            else run_reference(block, x, temb, text, res_hidden_states_tuple=skips, upsample_size=(12, 10))
        ],
    )


def test_wrong_shapes():
    model, _ = make_unets(LIKE_SD15)
    temb, text = conditions()
    with pytest.raises(ShapeError, match=r"DownBlock2D.forward: argument `hidden_states`: .* got float32 \[8, 6, 5\]"):
        model.down_blocks[1](torch.ones(8, 6, 5), temb, text)
    with pytest.raises(ShapeError, match=r"UNetMidBlock2DCrossAttn.forward: argument `temb`: .*batch=3.* got float32 \[2, 32\]"):
        model.mid_block(torch.ones(3, 16, 2, 2), temb, text)
    with pytest.raises(ShapeError, match=r"UpBlock2D.forward: argument `res_hidden_states_tuple`: .*height=2 width=2.*\[2, 16, 2, 3\]"):
        model.up_blocks[0](torch.ones(2, 16, 2, 2), (torch.ones(2, 16, 2, 3),) * 3, temb, text, (4, 4))


def _skips_oldest_first(self, hidden_states, skips, *rest, forward=UpBlock2D.forward):
    return forward(self, hidden_states, tuple(reversed(skips)), *rest)


def test_planted_bug_in_the_order_of_skips_is_found(monkeypatch):
    monkeypatch.setattr(UpBlock2D, "forward", _skips_oldest_first)
    with pytest.raises(AssertionError):
        test_up("UpBlock2D", (12, 10), torch.float32)


def _skip_in_front(tensors, dim, cat=torch.cat):
    return cat(tensors[::-1], dim=dim)


def test_planted_bug_in_the_order_of_channels_is_found(monkeypatch):
    ours, reference = (model.up_blocks[0] for model in make_unets(LIKE_SD15))
    x, skips, (temb, text) = torch.randn(2, 16, 6, 5), tuple(torch.randn(2, 16, 6, 5) for _ in range(3)), conditions()
    expected = run_reference(reference, x, temb, text, res_hidden_states_tuple=skips)
    monkeypatch.setattr("flux_lab.sd15.blocks.torch.cat", _skip_in_front)
    with pytest.raises(AssertionError):
        assert_parity(ours(x, skips, temb, text, (12, 10)), expected)
