"""instruments.latent_rgb: the fitted map finds a linear relation that is there, and says how much it misses."""

import pytest
import torch
import torch.nn.functional as F

from flux_lab.instruments.latent_rgb import latent_rgb_factors, latents_as_rgb


def make_pictures(noise: float = 0.0):
    """Random latents, and images that are a linear function of them, eight times as large."""
    latents, factors = torch.randn(3, 16, 4, 6), torch.randn(16, 3) / 40
    small = torch.einsum("bcyx,cr->bryx", latents, factors) + torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    images = F.interpolate(small, scale_factor=8, mode="nearest")
    return latents, images + noise * torch.randn(images.shape), factors, small


def test_a_linear_relation_is_found():
    latents, images, factors, small = make_pictures()
    fitted = latent_rgb_factors(latents, images)
    torch.testing.assert_close(fitted.factors, factors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted.offset, torch.tensor([0.4, 0.5, 0.6]), rtol=1e-4, atol=1e-5)
    assert fitted.unexplained < 1e-9
    torch.testing.assert_close(latents_as_rgb(latents, fitted), small.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_what_is_not_linear_is_missed():
    latents, images, _, _ = make_pictures(noise=4.0)
    assert 0.3 < latent_rgb_factors(latents, images).unexplained < 1
    colours = latents_as_rgb(100 * latents, latent_rgb_factors(latents, images))
    assert (colours.min(), colours.max()) == (0, 1)


def test_too_few_latents():
    with pytest.raises(ValueError, match="latents: expected at least 17 places to fit as many numbers a colour, got 16"):
        latent_rgb_factors(torch.randn(1, 16, 4, 4), torch.rand(1, 3, 32, 32))
