"""flux_lab.sd15.transformer_2d equals diffusers' GEGLU, FeedForward, BasicTransformerBlock and Transformer2DModel, gradients too."""

import pytest
import torch
from conftest import assert_parity, copy_weights, randomize_
from diffusers.models.attention import BasicTransformerBlock as ReferenceBlock
from diffusers.models.attention import FeedForward as ReferenceFeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel as ReferenceTransformer
from sd15_parts import assert_same_gradients

from flux_lab.sd15 import transformer_2d
from flux_lab.sd15.config import TINY_UNET
from flux_lab.sd15.transformer_2d import GEGLU, BasicTransformerBlock, FeedForward, Transformer2DModel
from flux_lab.shapes import ShapeError

DIM, HEADS, TEXT_DIM = 16, TINY_UNET.heads, TINY_UNET.cross_attention_dim


def make_transformers(dtype=torch.float32):
    reference = ReferenceTransformer(HEADS, DIM // HEADS, in_channels=DIM, norm_num_groups=4, cross_attention_dim=TEXT_DIM)
    reference = randomize_(reference).to(dtype)
    return copy_weights(Transformer2DModel(TINY_UNET, DIM), reference), reference


def make_inputs(dtype=torch.float32):
    return torch.randn(2, DIM, 5, 3).to(dtype), torch.randn(2, 7, TEXT_DIM).to(dtype)


def test_transformer(dtype):
    ours, reference = make_transformers(dtype)
    inputs = make_inputs(dtype)
    assert_parity(ours(*inputs), reference(*inputs, return_dict=False)[0])


def test_gradients():
    inputs = make_inputs()
    ours, reference = make_transformers()
    assert_same_gradients(ours, reference, lambda module: [module(*inputs) if module is ours else module(*inputs, return_dict=False)[0]])


def test_block(dtype):
    reference = randomize_(ReferenceBlock(DIM, HEADS, DIM // HEADS, cross_attention_dim=TEXT_DIM)).to(dtype)
    ours = copy_weights(BasicTransformerBlock(DIM, HEADS, TEXT_DIM), reference)
    image, text = torch.randn(2, 15, DIM).to(dtype), torch.randn(2, 7, TEXT_DIM).to(dtype)
    assert_parity(ours(image, text), reference(image, encoder_hidden_states=text))


def test_feed_forward(dtype):
    reference = randomize_(ReferenceFeedForward(DIM)).to(dtype)
    ours = copy_weights(FeedForward(DIM), reference)
    x = torch.randn(2, 15, DIM).to(dtype)
    assert_parity(ours(x), reference(x))
    assert_parity(ours.net[0](x), reference.net[0](x))


def test_wrong_shapes():
    ours, _ = make_transformers()
    with pytest.raises(ShapeError, match=r"Transformer2DModel.forward: argument `hidden_states`: .* got float32 \[16, 5, 3\]"):
        ours(torch.ones(DIM, 5, 3), torch.ones(1, 7, TEXT_DIM))
    with pytest.raises(
        ShapeError, match=r"Transformer2DModel.forward: argument `encoder_hidden_states`: .*batch=2.* got float32 \[3, 7, 10\]"
    ):
        ours(torch.ones(2, DIM, 5, 3), torch.ones(3, 7, TEXT_DIM))
    with pytest.raises(ShapeError, match=r"BasicTransformerBlock.forward: argument `hidden_states`: .* got float32 \[15, 16\]"):
        ours.transformer_blocks[0](torch.ones(15, DIM), torch.ones(1, 7, TEXT_DIM))
    with pytest.raises(ShapeError, match=r"FeedForward.forward: argument `hidden_states`: .* got float32 \[15, 16\]"):
        FeedForward(DIM)(torch.ones(15, DIM))


def _gate_first(self, hidden_states):
    gates, values = self.proj(hidden_states).chunk(2, dim=-1)
    return values * torch.nn.functional.gelu(gates)


def _text_first(self, image, text):
    image = self.attn2(self.norm2(image), text) + image
    image = self.attn1(self.norm1(image)) + image
    return self.ff(self.norm3(image)) + image


@pytest.mark.parametrize(
    "bug",
    [(GEGLU, "forward", _gate_first), (BasicTransformerBlock, "forward", _text_first), (transformer_2d, "NORM_EPS", 1e-3)],
    ids=["gates and values exchanged", "cross attention first", "eps of the norm"],
)
def test_planted_bugs_are_found(bug, monkeypatch):
    monkeypatch.setattr(*bug)
    with pytest.raises(AssertionError):
        test_transformer(torch.float32)
