"""flux_lab.inference.fast_autoencoder: the same picture within rounding, channels last."""

import dataclasses

import pytest
import torch
from conftest import randomize_

from flux_lab.autoencoder import AutoencoderKL, Upsample2D
from flux_lab.config import FLUX_VAE, TINY_VAE
from flux_lab.inference.fast_autoencoder import FastUpsample2D, fast_autoencoder, normalize_
from flux_lab.inference.live_bytes import FusedAttention, LiveBytes


def make_pair(**options):
    model = randomize_(AutoencoderKL(dataclasses.replace(TINY_VAE, sample_size=32)))
    return fast_autoencoder(model, **options), model


@pytest.mark.parametrize("batch", [1, 3])
def test_equal(batch):
    faster, model = make_pair()
    latents = torch.randn(batch, 16, 5, 6)
    before = latents.clone()
    torch.testing.assert_close(faster.decode(latents), model.decode(latents), rtol=1e-4, atol=1e-5)
    assert torch.equal(latents, before)
    images = torch.randn(batch, 3, 32, 40)
    torch.testing.assert_close(faster.encode(images).mean, model.encode(images).mean, rtol=1e-4, atol=1e-5)


def test_tiles_are_the_autoencoders_own():
    faster, model = make_pair(tiling=True)
    latents = torch.randn(1, 16, 7, 5)
    whole = model.decode(latents)
    model.enable_tiling()
    torch.testing.assert_close(faster.decode(latents), model.decode(latents), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(faster.decode(latents), whole, atol=1e-3), "tiles do not see their surroundings"


def test_weights_lie_channels_last_and_the_models_do_not():
    faster, model = make_pair()
    kernels = [parameter for parameter in faster.parameters() if parameter.ndim == 4 and parameter.shape[2] > 1]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("groups", [2, 3, 8])
def test_norm_in_place(groups):
    norm, x = randomize_(torch.nn.GroupNorm(groups, 24)), torch.randn(2, 24, 5, 3)
    wanted = norm(x)
    assert normalize_(norm, x) is x
    torch.testing.assert_close(x, wanted)


def test_less_memory():
    """Of decoding 512 x 512 pixels at the real width: counted on `meta`, which takes none."""
    with torch.device("meta"):
        model = AutoencoderKL(FLUX_VAE)
        faster, latents = fast_autoencoder(model), torch.empty(1, 16, 64, 64)
        peaks = []
        for each in (model, faster):
            with LiveBytes(ignored=each.parameters(), meta=True) as live, FusedAttention(), torch.no_grad():
                each.decode(latents)
            peaks.append(live.peak)
    assert peaks[1] <= 0.7 * peaks[0]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 3)])
def test_upsampling_in_one(rows, columns):
    plain = randomize_(Upsample2D(6))
    x = torch.randn(2, 6, rows, columns)
    torch.testing.assert_close(FastUpsample2D(plain)(x), plain(x), rtol=1e-5, atol=1e-5)


def test_a_planted_bug_is_noticed():
    plain = randomize_(Upsample2D(6))
    faster, x = FastUpsample2D(plain), torch.randn(2, 6, 4, 3)
    faster.weight.data = faster.weight.flip(3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(faster(x), plain(x), rtol=1e-5, atol=1e-5)
