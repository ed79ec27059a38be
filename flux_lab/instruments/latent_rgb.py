"""Latents as colours: a linear map from 16 channels to red, green and blue, fitted to pictures and their latents.

It shows what latents hold at every step without running the VAE's decoder: an eighth of the size, and roughly the right colours.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from flux_lab.shapes import shaped

PLACES = "batch channels rows columns -> (batch rows columns) channels"


class LatentRGB(NamedTuple):
    """colour = latent @ factors + offset, from 0 to 1. `unexplained` is the share of the colours' variance that the map misses."""

    factors: Float[Tensor, "channels 3"]
    offset: Float[Tensor, "3"]
    unexplained: float


@shaped
def latent_rgb_factors(latents: Float[Tensor, "batch channels rows columns"], images: Float[Tensor, "batch 3 height width"]) -> LatentRGB:
    """Fit the map by least squares to latents and the images that they stand for, colours in 0 ... 1.

    Every image is averaged down to the size of its latents. Raises ValueError when there are fewer latents than numbers to fit.
    """
    known = rearrange(latents.double(), PLACES)
    known = torch.cat([known, torch.ones_like(known[:, :1])], dim=1)
    if len(known) < known.shape[1]:
        raise ValueError(f"latents: expected at least {known.shape[1]} places to fit as many numbers a colour, got {len(known)}")
    wanted = rearrange(F.interpolate(images.double(), size=latents.shape[2:], mode="area"), PLACES)
    # By singular values: channels that say the same must not blow the solution up.
    solution = torch.linalg.pinv(known) @ wanted
    missed = (wanted - known @ solution).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()
    return LatentRGB(solution[:-1].float(), solution[-1].float(), missed.item())


@shaped
def latents_as_rgb(latents: Float[Tensor, "batch channels rows columns"], fitted: LatentRGB) -> Float[Tensor, "batch 3 rows columns"]:
    """Latents as small images, colours clamped to 0 ... 1."""
    factors, offset = (each.to(latents.device) for each in (fitted.factors, fitted.offset))
    colours = einsum(latents.float(), factors, "batch channels rows columns, channels rgb -> batch rgb rows columns")
    return (colours + offset[:, None, None]).clamp(0, 1)
