"""The exercises of lesson 12."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception

DOUBLE, SINGLE = torch.float64, torch.float32


def drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)


def like_batch(numbers: Tensor, tensor: Tensor) -> Tensor:
    """One number for each of a batch, shaped so that it multiplies `tensor`."""
    return numbers.reshape(len(numbers), *[1] * (tensor.ndim - 1)).to(tensor.dtype)


# ---- the forward process ------------------------------------------------------------------------------------------------


def mixed(picture: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """`signal` times the picture plus `spread` times the noise, each a number for every one of the batch."""
    return like_batch(signal, picture) * picture + like_batch(spread, noise) * noise


def noised_at(picture: Tensor, noise: Tensor, timesteps: Tensor, betas: Tensor) -> Tensor:
    """x_t for each of a batch: sqrt(a_t) picture + sqrt(1 - a_t) noise, with a_t the product of 1 - beta up to t."""
    kept = torch.cumprod(1 - betas, dim=0)[timesteps]
    return mixed(picture, noise, kept**0.5, (1 - kept) ** 0.5)


def noised(picture: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    return mixed(picture, noise, kept**0.5, (1 - kept) ** 0.5)


def noisy_batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    schedules = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=DOUBLE) ** 2, torch.linspace(0.001, 0.03, 400, dtype=DOUBLE)
    for shape, dtype, betas in (
        ((2, 4, 3, 5), SINGLE, schedules[0]),
        ((3, 2, 4, 4), DOUBLE, schedules[1]),
        ((1, 4, 6, 2), SINGLE, schedules[1]),
    ):
        timesteps = torch.randint(20, len(betas) - 1, (shape[0],), generator=generator)
        picture, noise = drawn(shape, dtype, generator), drawn(shape, dtype, generator)
        yield {"picture": picture, "noise": noise, "timesteps": timesteps, "betas": betas.to(dtype)}


NOISED_AT = Exercise(
    name="noised_at",
    reference=noised_at,
    cases=noisy_batches,
    misconceptions=(
        Misconception(
            "only the last step's noise",
            lambda picture, noise, timesteps, betas: noised(picture, noise, (1 - betas)[timesteps]),
            "you use 1 - beta of timestep t alone. That is what one timestep keeps; after t of them the product of all is left:"
            " `torch.cumprod`",
        ),
        Misconception(
            "added up, not multiplied",
            lambda picture, noise, timesteps, betas: noised(picture, noise, 1 - torch.cumsum(betas, dim=0)[timesteps]),
            "you add up the betas. Each timestep keeps the share 1 - beta of what the one before left, so the shares are multiplied",
        ),
        Misconception(
            "no roots",
            lambda picture, noise, timesteps, betas: mixed(
                picture, noise, torch.cumprod(1 - betas, dim=0)[timesteps], 1 - torch.cumprod(1 - betas, dim=0)[timesteps]
            ),
            "you left out the square roots. a_t and 1 - a_t are shares of the variance; the weights are their roots. Weights that add up"
            " to one are FLUX's",
        ),
        Misconception(
            "FLUX's straight line",
            lambda picture, noise, timesteps, betas: mixed(
                picture, noise, 1 - timesteps.to(betas.dtype) / len(betas), timesteps.to(betas.dtype) / len(betas)
            ),
            "this is a straight mixture with sigma = t / 1000, which is FLUX's. Here the weights come from the table of betas",
        ),
        Misconception(
            "weights swapped",
            lambda picture, noise, timesteps, betas: noised(noise, picture, torch.cumprod(1 - betas, dim=0)[timesteps]),
            "the weights are swapped: at timestep 0 you give nearly pure noise. sqrt(a_t), which starts near 1, belongs to the picture",
        ),
        Misconception(
            "one timestep late",
            lambda picture, noise, timesteps, betas: noised(picture, noise, torch.cumprod(1 - betas, dim=0)[timesteps + 1]),
            "your table is off by one: the noise of timestep t is in x_t already, and no more. Entry t of the cumulative product is a_t",
        ),
        Misconception(
            "noise not scaled",
            lambda picture, noise, timesteps, betas: mixed(
                picture, noise, torch.cumprod(1 - betas, dim=0)[timesteps] ** 0.5, torch.ones_like(betas[timesteps])
            ),
            "you add the noise at full strength. It is scaled by sqrt(1 - a_t), so that the variance of the sum stays 1",
        ),
    ),
)


# ---- from predicted noise to FLUX's velocity ------------------------------------------------------------------------------


def picture_of(sample: Tensor, epsilon: Tensor, kept: float) -> Tensor:
    """The picture that a predicted noise means: the forward process, solved for x_0."""
    return (sample - (1 - kept) ** 0.5 * epsilon) / kept**0.5


def flux_velocity(sample: Tensor, epsilon: Tensor, kept: float) -> Tensor:
    """FLUX's velocity, noise minus picture, from x_t, the noise predicted in it, and a_t."""
    return epsilon - picture_of(sample, epsilon, kept)


def predictions() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    for shape, dtype in (((1, 4, 3, 3), SINGLE), ((2, 4, 2, 5), DOUBLE), ((3, 2, 4), SINGLE)):
        for kept in (0.9, 0.42, 0.2):
            yield {"sample": drawn(shape, dtype, generator), "epsilon": drawn(shape, dtype, generator), "kept": kept}


FLUX_VELOCITY = Exercise(
    name="flux_velocity",
    reference=flux_velocity,
    cases=predictions,
    misconceptions=(
        Misconception(
            "other way round",
            lambda sample, epsilon, kept: picture_of(sample, epsilon, kept) - epsilon,
            "the sign is turned: you give picture minus noise. FLUX's velocity points from the picture to the noise",
        ),
        Misconception(
            "the picture itself",
            picture_of,
            "this is x_0, the predicted picture. One subtraction is missing: the velocity is the noise minus the picture",
        ),
        Misconception(
            "SD's v",
            lambda sample, epsilon, kept: kept**0.5 * epsilon - (1 - kept) ** 0.5 * picture_of(sample, epsilon, kept),
            "this is v of v prediction, sqrt(a) noise - sqrt(1 - a) picture. FLUX's velocity has no weights: noise minus picture",
        ),
        Misconception(
            "noise minus sample",
            lambda sample, epsilon, kept: epsilon - sample,
            "you subtract x_t, the mixture. Solve for the picture first: x_t still holds noise",
        ),
        Misconception(
            "no division",
            lambda sample, epsilon, kept: epsilon - (sample - (1 - kept) ** 0.5 * epsilon),
            "after you took the noise off, sqrt(a) times the picture is left: divide by sqrt(a)",
        ),
        Misconception(
            "no roots",
            lambda sample, epsilon, kept: epsilon - (sample - (1 - kept) * epsilon) / kept,
            "the weights are sqrt(a) and sqrt(1 - a): you used a and 1 - a",
        ),
        Misconception(
            "FLUX's mixture",
            lambda sample, epsilon, kept: (epsilon - sample) / kept**0.5,
            "you solved x = (1 - s) x_0 + s n, a mixture whose weights add up to one. Here it is their squares that do",
        ),
    ),
)


# ---- guidance -----------------------------------------------------------------------------------------------------------


def guided_noise(both: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of a doubled batch, the first half of it predicted without the prompt."""
    without, with_prompt = both.chunk(2)
    return without + scale * (with_prompt - without)


def doubled_batches() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    for shape, dtype in (((2, 4, 3, 3), SINGLE), ((4, 4, 2, 5), DOUBLE), ((6, 2, 4, 4), SINGLE)):
        for scale in (7.5, 1.25, 3.0):
            yield {"both": drawn(shape, dtype, generator), "scale": scale}


def interleaved(both: Tensor, scale: float) -> Tensor:
    return both[0::2] + scale * (both[1::2] - both[0::2])


GUIDED_NOISE = Exercise(
    name="guided_noise",
    reference=guided_noise,
    cases=doubled_batches,
    misconceptions=(
        Misconception(
            "halves swapped",
            lambda both, scale: guided_noise(both.roll(len(both) // 2, dims=0), scale),
            "the halves are swapped: this drives the picture away from the prompt. The negative prompt comes first in the batch",
        ),
        Misconception(
            "counted from the prompt",
            lambda both, scale: both.chunk(2)[1] + scale * (both.chunk(2)[1] - both.chunk(2)[0]),
            "you go `scale` beyond the prediction with the prompt. Start from the one without: then a scale of 1 means no guidance",
        ),
        Misconception(
            "only multiplied",
            lambda both, scale: scale * both.chunk(2)[1],
            "you multiply the prediction with the prompt. Noise of another strength is no stronger prompt: what is multiplied is the"
            " difference that the prompt makes",
        ),
        Misconception(
            "difference alone",
            lambda both, scale: scale * (both.chunk(2)[1] - both.chunk(2)[0]),
            "you give the scaled difference alone. It is added to the prediction without the prompt",
        ),
        Misconception(
            "averaged",
            lambda both, scale: (both.chunk(2)[0] + scale * both.chunk(2)[1]) / (1 + scale),
            "you take a weighted mean of the two. A mean stays between them; guidance goes beyond the one with the prompt",
        ),
        Misconception(
            "pairs side by side",
            interleaved,
            "you take every second entry. The batch holds all predictions without the prompt first, then all with it: `chunk(2)`",
        ),
    ),
)


# ---- the skips of a UNet --------------------------------------------------------------------------------------------------


def skip_shapes(sample_size: int, block_out_channels: Sequence[int], layers_per_block: int) -> list[tuple[int, int]]:
    """(channels, side) of every skip of a UNet, in the order in which they are made."""
    return skips_of(sample_size, block_out_channels, [layers_per_block] * len(block_out_channels))


def skips_of(
    side: int,
    channels: Sequence[int],
    layers: Sequence[int],
    *,
    with_input: bool = True,
    last_halves: bool = False,
    kept_after_halving: bool = True,
    widened_after_halving: bool = False,
) -> list[tuple[int, int]]:
    skips = [(channels[0], side)] if with_input else []
    for level, width in enumerate(channels):
        skips += [(width, side)] * layers[level]
        is_last = level == len(channels) - 1
        if is_last and not last_halves:
            break
        side = (side + 1) // 2
        if kept_after_halving:
            skips.append((channels[min(level + 1, len(channels) - 1)] if widened_after_halving else width, side))
    return skips


def unets() -> Iterator[dict[str, Any]]:
    yield {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
    yield {"sample_size": 16, "block_out_channels": (20, 40, 80, 80), "layers_per_block": 2}
    yield {"sample_size": 96, "block_out_channels": (32, 64, 96), "layers_per_block": 3}
    yield {"sample_size": 24, "block_out_channels": (8, 16), "layers_per_block": 1}


def each(layers: int, channels: Sequence[int]) -> list[int]:
    return [layers] * len(channels)


SKIP_SHAPES = Exercise(
    name="skip_shapes",
    reference=skip_shapes,
    cases=unets,
    misconceptions=(
        Misconception(
            "first convolution forgotten",
            lambda sample_size, block_out_channels, layers_per_block: skips_of(
                sample_size, block_out_channels, each(layers_per_block, block_out_channels), with_input=False
            ),
            "the first skip is missing: what `conv_in` makes is kept too, before any block",
        ),
        Misconception(
            "downsamplers forgotten",
            lambda sample_size, block_out_channels, layers_per_block: skips_of(
                sample_size, block_out_channels, each(layers_per_block, block_out_channels), kept_after_halving=False
            ),
            "the downsamplers' results are missing: each is kept as a skip, at the smaller size",
        ),
        Misconception(
            "last level halves too",
            lambda sample_size, block_out_channels, layers_per_block: skips_of(
                sample_size, block_out_channels, each(layers_per_block, block_out_channels), last_halves=True
            ),
            "the last level has no downsampler: the middle block works at its size",
        ),
        Misconception(
            "downsampler widens",
            lambda sample_size, block_out_channels, layers_per_block: skips_of(
                sample_size, block_out_channels, each(layers_per_block, block_out_channels), widened_after_halving=True
            ),
            "a downsampler keeps the number of channels. The next level's first ResNet block changes it",
        ),
        Misconception(
            "layers of the way up",
            lambda sample_size, block_out_channels, layers_per_block: skips_of(
                sample_size, block_out_channels, each(layers_per_block + 1, block_out_channels)
            ),
            "you counted a layer too many at every level. That is the way up, where each layer takes one skip; the way down makes them with"
            " `layers_per_block` layers and a downsampler",
        ),
        Misconception(
            "newest first",
            lambda sample_size, block_out_channels, layers_per_block: skip_shapes(sample_size, block_out_channels, layers_per_block)[::-1],
            "this is the order in which the way up takes them. Give them in the order in which they are made",
        ),
        Misconception(
            "one a level",
            lambda sample_size, block_out_channels, layers_per_block: [
                (width, sample_size // 2**level) for level, width in enumerate(block_out_channels)
            ],
            "you keep one skip a level. Every layer's result is kept, and so is every downsampler's",
        ),
    ),
)

EXERCISES = (NOISED_AT, FLUX_VELOCITY, GUIDED_NOISE, SKIP_SHAPES)
