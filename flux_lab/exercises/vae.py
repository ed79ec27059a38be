"""The exercises of lesson 11."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception

BYTE = 255
DOUBLE, SINGLE = torch.float64, torch.float32


def drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)


# ---- undoing the scaling ------------------------------------------------------------------------------------------------


def unscale_latents(latents: Tensor, scaling_factor: float, shift_factor: float) -> Tensor:
    """The transformer's latents as the decoder wants them."""
    return latents / scaling_factor + shift_factor


def scaled_latents() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in (((1, 16, 4, 4), SINGLE), ((2, 3, 5, 2), DOUBLE), ((1, 4, 3, 7), torch.bfloat16)):
        for scaling_factor, shift_factor in ((0.3611, 0.1159), (0.55, -0.75)):
            yield {"latents": drawn(shape, dtype, generator), "scaling_factor": scaling_factor, "shift_factor": shift_factor}


UNSCALE_LATENTS = Exercise(
    name="unscale_latents",
    reference=unscale_latents,
    cases=scaled_latents,
    misconceptions=(
        Misconception(
            "shift first",
            lambda latents, scaling_factor, shift_factor: (latents + shift_factor) / scaling_factor,
            "you add the shift before you divide. To scale, the shift came off first; to undo, it goes on last",
        ),
        Misconception(
            "factor multiplied",
            lambda latents, scaling_factor, shift_factor: latents * scaling_factor + shift_factor,
            "you multiply by the scaling factor. To scale was to multiply, so to undo is to divide",
        ),
        Misconception(
            "scaled again",
            lambda latents, scaling_factor, shift_factor: (latents - shift_factor) * scaling_factor,
            "this is the way in, from the encoder to the transformer. You need the way out",
        ),
        Misconception(
            "shift with the wrong sign",
            lambda latents, scaling_factor, shift_factor: latents / scaling_factor - shift_factor,
            "you subtract the shift. It was subtracted on the way in, so on the way out it is added",
        ),
        Misconception(
            "no shift",
            lambda latents, scaling_factor, shift_factor: latents / scaling_factor,
            "you left the shift out. That was right for SD 1.5, whose configuration has none; FLUX.1's has one",
        ),
        Misconception(
            "scale and shift swapped",
            lambda latents, scaling_factor, shift_factor: latents / shift_factor + scaling_factor,
            "scale and shift are swapped: you divide by shift_factor and add scaling_factor",
        ),
    ),
)


# ---- the KL divergence --------------------------------------------------------------------------------------------------


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1) in nats, summed over each picture: [batch]."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def gaussians() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    # Of negative numbers the logarithm is NaN, whoever takes it. One case has none, which tells such answers apart.
    for shape, dtype, center in (((2, 4, 3, 5), SINGLE, -1), ((3, 2, 4, 4), DOUBLE, -1), ((1, 16, 2, 2), SINGLE, 3)):
        yield {"mean": drawn(shape, dtype, generator), "logvar": 0.5 * drawn(shape, dtype, generator) + center}


KL_DIVERGENCE = Exercise(
    name="kl_divergence",
    reference=kl_divergence,
    cases=gaussians,
    misconceptions=(
        Misconception(
            "logvar taken for the variance",
            lambda mean, logvar: 0.5 * (mean**2 + logvar - 1 - logvar.log()).sum(dim=(1, 2, 3)),
            "you use logvar as the variance. It is the variance's logarithm: the variance is logvar.exp()",
        ),
        Misconception(
            "logvar taken for the log of the deviation",
            lambda mean, logvar: 0.5 * (mean**2 + (2 * logvar).exp() - 1 - 2 * logvar).sum(dim=(1, 2, 3)),
            "you take logvar for the logarithm of the standard deviation. It is that of the variance: do not double it",
        ),
        Misconception(
            "averaged",
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3)),
            "you average over the latent numbers. They are independent, so their divergences add up: use a sum",
        ),
        Misconception(
            "batch summed too",
            lambda mean, logvar: 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(),
            "you sum over the batch too. Each picture has a divergence of its own: the result's shape is [batch]",
        ),
        Misconception(
            "the other way round",
            lambda mean, logvar: 0.5 * ((mean**2 + 1) / logvar.exp() - 1 + logvar).sum(dim=(1, 2, 3)),
            "this is the divergence of the standard normal from the posterior. The two directions differ; we need the posterior's from the"
            " standard normal",
        ),
        Misconception(
            "sign",
            lambda mean, logvar: -0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)),
            "your sign is wrong: a KL divergence is never negative. Write-ups that begin with 1 + logvar - mean² have a minus in front",
        ),
        Misconception(
            "half forgotten",
            lambda mean, logvar: (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)),
            "you left out the factor 1/2, which comes from the 2 in the Gaussian's exponent",
        ),
    ),
)


# ---- numbers to bytes ---------------------------------------------------------------------------------------------------


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as whole numbers 0 ... 255, rounded; what lies outside becomes the nearest of the two ends."""
    return ((images * 0.5 + 0.5).clamp(0, 1) * BYTE).round().to(torch.uint8)


def decoded() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for shape, dtype in (((1, 3, 8, 6), SINGLE), ((2, 3, 4, 5), DOUBLE), ((1, 1, 7, 3), SINGLE)):
        yield {"images": 0.8 * drawn(shape, dtype, generator)}


def wrapped(values: Tensor) -> Tensor:
    """As a conversion without a clamp does it: 256 becomes 0."""
    return (values.to(torch.int64) % (BYTE + 1)).to(torch.uint8)


TO_BYTES = Exercise(
    name="to_bytes",
    reference=to_bytes,
    cases=decoded,
    misconceptions=(
        Misconception(
            "cut off",
            lambda images: ((images * 0.5 + 0.5).clamp(0, 1) * BYTE).to(torch.uint8),
            "you cut off the fraction: 254.9 becomes 254, and every picture gets a little darker. Round before you convert",
        ),
        Misconception(
            "no clamp",
            lambda images: wrapped(((images * 0.5 + 0.5) * BYTE).round()),
            "you do not clamp. The decoder overshoots a little, and a byte starts again at 0 after 255: white turns black",
        ),
        Misconception(
            "taken for 0 to 1",
            lambda images: (images.clamp(0, 1) * BYTE).round().to(torch.uint8),
            "you treat the numbers as if they were in [0, 1]. They are in [-1, 1]: everything darker than middle gray is lost",
        ),
        Misconception(
            "256",
            lambda images: ((images * 0.5 + 0.5).clamp(0, 1) * (BYTE + 1)).round().clamp(0, BYTE).to(torch.uint8),
            "you multiply by 256. There are 256 values, but the largest is 255",
        ),
        Misconception(
            "clamped too early",
            lambda images: ((images.clamp(0, 1) * 0.5 + 0.5) * BYTE).round().to(torch.uint8),
            "you clamp to [0, 1] before you move the numbers there: everything darker than middle gray becomes middle gray",
        ),
    ),
)


# ---- joining two tiles --------------------------------------------------------------------------------------------------


def join_tiles(left: Tensor, right: Tensor, overlap: int) -> Tensor:
    """Two tiles as one, the last `overlap` columns of `left` faded into the first of `right`: column i has i / overlap of `right`."""
    weight = torch.arange(overlap, dtype=left.dtype) / overlap
    faded = left[..., -overlap:] * (1 - weight) + right[..., :overlap] * weight
    return torch.cat([left[..., :-overlap], faded, right[..., overlap:]], dim=-1)


def tiles() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    for shape, dtype, overlap in (((1, 3, 4, 8), SINGLE, 4), ((2, 3, 5, 9), DOUBLE, 3), ((1, 1, 3, 12), SINGLE, 5)):
        yield {"left": drawn(shape, dtype, generator), "right": drawn(shape, dtype, generator), "overlap": overlap}


def with_middle(left: Tensor, right: Tensor, overlap: int, middle: Tensor) -> Tensor:
    return torch.cat([left[..., :-overlap], middle, right[..., overlap:]], dim=-1)


def backwards(left: Tensor, right: Tensor, overlap: int) -> Tensor:
    weight = torch.arange(overlap, dtype=left.dtype) / overlap
    return with_middle(left, right, overlap, left[..., -overlap:] * weight + right[..., :overlap] * (1 - weight))


def wrong_columns(left: Tensor, right: Tensor, overlap: int) -> Tensor:
    weight = torch.arange(overlap, dtype=left.dtype) / overlap
    return with_middle(left, right, overlap, left[..., :overlap] * (1 - weight) + right[..., -overlap:] * weight)


JOIN_TILES = Exercise(
    name="join_tiles",
    reference=join_tiles,
    cases=tiles,
    misconceptions=(
        Misconception(
            "side by side",
            lambda left, right, overlap: torch.cat([left, right], dim=-1),
            "you put the tiles side by side. They show the same columns twice: the result is `overlap` columns narrower",
        ),
        Misconception(
            "left wins",
            lambda left, right, overlap: torch.cat([left, right[..., overlap:]], dim=-1),
            "in the overlap you keep only the left tile. That moves the seam, but does not soften it",
        ),
        Misconception(
            "right wins",
            lambda left, right, overlap: torch.cat([left[..., :-overlap], right], dim=-1),
            "in the overlap you keep only the right tile. That moves the seam, but does not soften it",
        ),
        Misconception(
            "averaged",
            lambda left, right, overlap: with_middle(left, right, overlap, (left[..., -overlap:] + right[..., :overlap]) / 2),
            "in the overlap you take the average. That makes two small seams of one large one: let the weight change from column to column",
        ),
        Misconception(
            "faded backwards",
            backwards,
            "your weights run the wrong way. Where the overlap begins, the result must still be the left tile",
        ),
        Misconception(
            "wrong columns",
            wrong_columns,
            "you fade the first columns of `left` into the last of `right`. The last of `left` and the first of `right` show the same"
            " place",
        ),
    ),
)

EXERCISES = (UNSCALE_LATENTS, KL_DIVERGENCE, TO_BYTES, JOIN_TILES)
