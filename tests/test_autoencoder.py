"""flux_lab.autoencoder equals diffusers' AutoencoderKL."""

import copy
import dataclasses

import pytest
import torch
from conftest import randomize_
from diffusers import AutoencoderKL as ReferenceAutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as ReferenceDistribution

from flux_lab import autoencoder
from flux_lab.autoencoder import AutoencoderKL, DiagonalGaussianDistribution
from flux_lab.config import FLUX_VAE, MINI_VAE, TINY_VAE
from flux_lab.shapes import ShapeError

LIKE_FLUX = TINY_VAE
LIKE_SD15 = dataclasses.replace(
    TINY_VAE,
    latent_channels=4,
    scaling_factor=0.18215,
    shift_factor=None,
    use_quant_conv=True,
    use_post_quant_conv=True,
    layers_per_block=2,
)
SHALLOW = dataclasses.replace(
    TINY_VAE,
    in_channels=2,
    out_channels=5,
    block_out_channels=(6, 12),
    norm_num_groups=3,
    latent_channels=7,
    sample_size=16,
    use_quant_conv=True,
)
CONFIGS = {"like_flux": LIKE_FLUX, "like_sd15": LIKE_SD15, "shallow": SHALLOW}
SIZES = [(16, 24), (37, 26)]


def reference_of(config, seed=0):
    return randomize_(ReferenceAutoencoderKL.from_config(config.to_dict()), seed)


def ours_of(config, reference):
    ours = AutoencoderKL.from_config(dict(reference.config)).requires_grad_(False)
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert ours.config == config
    return ours.to(reference.dtype)


def make_pair(config, dtype=torch.float32):
    reference = reference_of(config).to(dtype)
    return ours_of(config, reference), reference


def images_for(config, size=(16, 24), batch=2, dtype=torch.float32):
    return torch.randn(batch, config.in_channels, *size).clamp(-1, 1).to(dtype)


def assert_same_both_ways(ours, reference, images, **tolerance):
    expected = reference.encode(images).latent_dist
    given = ours.encode(images)
    for field in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(given, field), getattr(expected, field), **tolerance)
    torch.testing.assert_close(ours.decode(expected.mean), reference.decode(expected.mean).sample, **tolerance)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32(config, size):
    ours, reference = make_pair(config)
    assert_same_both_ways(ours, reference, images_for(config, size), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_half_precision_is_bit_equal(config, dtype):
    ours, reference = make_pair(config, dtype)
    assert_same_both_ways(ours, reference, images_for(config, dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients(config):
    """Gradients of encode, sample and decode together, for the images and for every parameter."""
    ours, reference = make_pair(config)
    gradients = []
    for model in (ours, reference):
        model.requires_grad_(True)
        images = images_for(config).fill_(0.3).requires_grad_(True)
        generator = torch.Generator().manual_seed(1)
        output = model(images, sample_posterior=True, generator=generator)
        output = output if isinstance(output, torch.Tensor) else output.sample
        output.square().mean().backward()
        gradients.append({"images": images.grad} | {name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max() for gradient in gradients[1].values())
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-4 * float(largest), msg=name)
