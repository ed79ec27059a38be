"""flux_lab.normalization equals diffusers' adaptive layer norms."""

import pytest
import torch
from conftest import assert_parity, copy_weights, randomize_
from diffusers.models import normalization as reference_normalization

from flux_lab.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from flux_lab.shapes import ShapeError

DIM = 20


def make_inputs(dtype=torch.float32):
    return torch.randn(3, 7, DIM).to(dtype), torch.randn(3, DIM).to(dtype)


def test_zero(dtype):
    reference = randomize_(reference_normalization.AdaLayerNormZero(DIM)).to(dtype)
    ours = copy_weights(AdaLayerNormZero(DIM), reference)
    x, temb = make_inputs(dtype)
    normed, gate, mlp = ours(x, temb)
    expected = reference(x, emb=temb)
    for given, wanted in zip((normed, gate, mlp.shift, mlp.scale, mlp.gate), expected, strict=True):
        assert_parity(given, wanted)
    assert not torch.allclose(mlp.shift, expected[3]), "shift and scale swapped would be noticed"


def test_zero_single(dtype):
    reference = randomize_(reference_normalization.AdaLayerNormZeroSingle(DIM)).to(dtype)
    x, temb = make_inputs(dtype)
    for given, wanted in zip(copy_weights(AdaLayerNormZeroSingle(DIM), reference)(x, temb), reference(x, emb=temb), strict=True):
        assert_parity(given, wanted)


def test_continuous_has_scale_before_shift(dtype):
    reference = randomize_(reference_normalization.AdaLayerNormContinuous(DIM, DIM, elementwise_affine=False, eps=1e-6)).to(dtype)
    ours = copy_weights(AdaLayerNormContinuous(DIM), reference)
    x, temb = make_inputs(dtype)
    assert_parity(ours(x, temb), reference(x, temb))
    ours.linear.weight.copy_(ours.linear.weight.roll(DIM, dims=0))
    assert not torch.allclose(ours(x, temb), reference(x, temb)), "shift before scale would be noticed"


@pytest.mark.parametrize("kind", [AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous])
def test_clear_error(kind):
    with pytest.raises(
        ShapeError, match=rf"{kind.__name__}.forward: argument `\w+`: expected float \[batch=3 dim={DIM}\], got float32 \[3, 21\]"
    ):
        kind(DIM)(torch.zeros(3, 7, DIM), torch.zeros(3, 21))
