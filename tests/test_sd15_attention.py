"""flux_lab.sd15.attention equals diffusers' Attention, within the image and across to the text."""

import pytest
import torch
from conftest import assert_parity, copy_weights, randomize_
from diffusers.models.attention_processor import Attention as ReferenceAttention

from flux_lab.sd15 import attention
from flux_lab.sd15.attention import Attention
from flux_lab.shapes import ShapeError

DIM, HEADS, TEXT_DIM = 12, 3, 10


def make_pair(cross, dtype=torch.float32):
    text_dim = TEXT_DIM if cross else None
    reference = randomize_(ReferenceAttention(DIM, text_dim, heads=HEADS, dim_head=DIM // HEADS)).to(dtype)
    return copy_weights(Attention(DIM, HEADS, text_dim), reference), reference


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_parity(cross, dtype):
    ours, reference = make_pair(cross, dtype)
    image = torch.randn(2, 15, DIM).to(dtype)
    text = torch.randn(2, 7, TEXT_DIM).to(dtype) if cross else None
    assert_parity(ours(image, text), reference(image, text))


def test_an_empty_text_changes_nothing_but_the_bias():
    """A zero prompt embedding has zero keys and values: only the output's bias is left, at every position the same."""
    ours, _ = make_pair(cross=True)
    output = ours(torch.randn(2, 15, DIM), torch.zeros(2, 7, TEXT_DIM))
    assert torch.equal(output, ours.to_out[0].bias.expand(2, 15, DIM))


def test_queries_and_keys_can_be_watched():
    ours, _ = make_pair(cross=True)
    seen = {}
    ours.attend.register_forward_hook(lambda module, args, kwargs, output: seen.update(kwargs), with_kwargs=True)
    ours(torch.randn(2, 15, DIM), torch.randn(2, 7, TEXT_DIM))
    assert {name: list(tensor.shape) for name, tensor in seen.items()} == {
        "query": [2, 15, 3, 4],
        "key": [2, 7, 3, 4],
        "value": [2, 7, 3, 4],
    }


def test_wrong_shapes():
    ours, _ = make_pair(cross=True)
    with pytest.raises(ShapeError, match=r"Attention.forward: argument `hidden_states`: .* got float32 \[15, 12\]"):
        ours(torch.ones(15, DIM), torch.ones(1, 7, TEXT_DIM))
    with pytest.raises(
        ShapeError, match=r"argument `encoder_hidden_states`: expected float \[batch=2 length text_dim\], got float32 \[1, 7, 10\]"
    ):
        ours(torch.ones(2, 15, DIM), torch.ones(1, 7, TEXT_DIM))
    with pytest.raises(
        ShapeError, match=r"Attend.forward: argument `value`: expected float \[batch=1 length=7 .* got float32 \[1, 6, 3, 4\]"
    ):
        ours.attend(torch.ones(1, 5, 3, 4), torch.ones(1, 7, 3, 4), torch.ones(1, 6, 3, 4))


def _without_scale(query, key, value, attend=torch.nn.functional.scaled_dot_product_attention):
    return attend(query, key, value, scale=1.0)


def test_planted_bug_in_the_scale_is_found(monkeypatch):
    ours, reference = make_pair(cross=True)
    image, text = torch.randn(2, 15, DIM), torch.randn(2, 7, TEXT_DIM)
    expected = reference(image, text)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", _without_scale)
    with pytest.raises(AssertionError):
        assert_parity(ours(image, text), expected)
