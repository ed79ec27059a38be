"""flux_lab.rope equals diffusers, its two forms agree, and scores depend on the difference of positions only."""

import pytest
import torch
from conftest import assert_parity
from diffusers.models.embeddings import apply_rotary_emb as reference_apply
from diffusers.models.embeddings import get_1d_rotary_pos_embed as reference_1d
from diffusers.models.transformers.transformer_flux import FluxPosEmbed as ReferencePosEmbed

from flux_lab.latents import prepare_latent_image_ids
from flux_lab.rope import FluxPosEmbed, apply_rotary_emb, get_1d_rotary_pos_embed
from flux_lab.shapes import ShapeError

AXES = (4, 6, 10)


@pytest.mark.parametrize("freqs_dtype", [torch.float32, torch.float64])
def test_one_axis(freqs_dtype):
    pos = torch.tensor([0.0, 1.0, 7.0, 255.0])
    options = {"theta": 10000.0, "freqs_dtype": freqs_dtype}
    ours, expected = (
        get_1d_rotary_pos_embed(56, pos, **options),
        reference_1d(56, pos, use_real=True, repeat_interleave_real=True, **options),
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    expected = reference_1d(56, pos, use_real=False, **options)
    assert torch.equal(get_1d_rotary_pos_embed(56, pos, use_real=False, **options), expected.to(torch.complex64))


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_three_axes(theta, dtype):
    ids = torch.cat([torch.zeros(5, 3), prepare_latent_image_ids(4, 7)]).to(dtype)
    ours, expected = FluxPosEmbed(theta, AXES)(ids), ReferencePosEmbed(theta, AXES)(ids)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_apply(dtype):
    x = torch.randn(2, 11, 3, sum(AXES)).to(dtype)
    rotation = FluxPosEmbed(10000.0, AXES)(torch.randint(0, 40, (11, 3)).float())
    expected = reference_apply(x, rotation, sequence_dim=1)
    assert_parity(apply_rotary_emb(x, rotation), expected)
    halves = reference_apply(x, rotation, sequence_dim=1, use_real_unbind_dim=-2)
    assert not torch.allclose(apply_rotary_emb(x, rotation), halves), "pairs of halves in place of neighbours would be noticed"


def test_both_forms_are_one_rotation():
    x, pos = torch.randn(2, 11, 3, 10), torch.randn(11) * 30
    real, complex_ = (apply_rotary_emb(x, get_1d_rotary_pos_embed(10, pos, use_real=use_real)) for use_real in (True, False))
    torch.testing.assert_close(real, complex_, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_difference_of_positions():
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at_query, at_key):
        turned = [apply_rotary_emb(x, get_1d_rotary_pos_embed(16, torch.tensor([at]))) for x, at in ((query, at_query), (key, at_key))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3.0, 10.0), score(103.0, 110.0), rtol=1e-4, atol=1e-4)
    assert (score(3.0, 10.0) - score(3.0, 11.0)).abs() > 1e-3


def test_clear_errors():
    with pytest.raises(ValueError, match="dim must be even, got 7"):
        get_1d_rotary_pos_embed(7, torch.zeros(2))
    with pytest.raises(ValueError, match="ids have 2 numbers a token, expected 3"):
        FluxPosEmbed(10000.0, AXES)(torch.zeros(5, 2))
    with pytest.raises(ShapeError, match="apply_rotary_emb: argument `image_rotary_emb`"):
        apply_rotary_emb(torch.zeros(1, 4, 2, 6), (torch.zeros(4, 8), torch.zeros(4, 8)))
