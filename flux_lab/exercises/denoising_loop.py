"""The exercises of lesson 10."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception

SHAPES = (((1, 6, 8), torch.float32), ((2, 3, 5), torch.float64), ((1, 4, 12), torch.bfloat16))


def drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# ---- the predicted picture ----------------------------------------------------------------------------------------------


def predicted_picture(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """x0: where the straight line through `latents` at noise level `sigma`, along `velocity`, reaches sigma = 0."""
    return latents - sigma * velocity


def places() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in SHAPES:
        for sigma in (1.0, 0.625, 0.25):
            yield {"latents": drawn(shape, dtype, generator), "velocity": drawn(shape, dtype, generator), "sigma": sigma}


PREDICTED_PICTURE = Exercise(
    name="predicted_picture",
    reference=predicted_picture,
    cases=places,
    misconceptions=(
        Misconception(
            "sigma forgotten",
            lambda latents, velocity, sigma: latents - velocity,
            "you go a whole unit along the velocity. That is right at sigma = 1 only; elsewhere sigma is all that is left to go",
        ),
        Misconception(
            "towards the noise",
            lambda latents, velocity, sigma: latents + sigma * velocity,
            "you walk towards the noise. The velocity is noise minus picture, so the picture lies against it",
        ),
        Misconception(
            "the rest to the noise",
            lambda latents, velocity, sigma: latents - (1 - sigma) * velocity,
            "you go 1 - sigma. That is the distance to the noise; to the picture it is sigma",
        ),
        Misconception(
            "the noise",
            lambda latents, velocity, sigma: latents + (1 - sigma) * velocity,
            "this is the other end of the line, the predicted noise at sigma = 1. The picture is at sigma = 0",
        ),
        Misconception(
            "velocity taken for the noise",
            lambda latents, velocity, sigma: (latents - sigma * velocity) / (1 - sigma) if sigma < 1 else latents - sigma * velocity,
            "you divide by 1 - sigma. That would be right if the network predicted the noise; it predicts noise minus picture",
        ),
        Misconception(
            "velocity taken for the picture",
            lambda latents, velocity, sigma: velocity.clone(),
            "you return the velocity. It is noise minus picture, not the picture",
        ),
    ),
)


# ---- true CFG -----------------------------------------------------------------------------------------------------------


def true_cfg(positive: Tensor, negative: Tensor, true_cfg_scale: float) -> Tensor:
    """The velocity of both passes together."""
    return negative + true_cfg_scale * (positive - negative)


def passes() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    for shape, dtype in SHAPES:
        for scale in (1.0, 2.5, 4.0):
            yield {"positive": drawn(shape, dtype, generator), "negative": drawn(shape, dtype, generator), "true_cfg_scale": scale}


TRUE_CFG = Exercise(
    name="true_cfg",
    reference=true_cfg,
    cases=passes,
    misconceptions=(
        Misconception(
            "starts from the positive",
            lambda positive, negative, true_cfg_scale: positive + true_cfg_scale * (positive - negative),
            "you start from the positive velocity, so a scale of 1 already overshoots. Start from the negative one: then 1 means no change",
        ),
        Misconception(
            "roles swapped",
            lambda positive, negative, true_cfg_scale: positive + true_cfg_scale * (negative - positive),
            "positive and negative are swapped: the larger the scale, the more the picture shows what was not wanted",
        ),
        Misconception(
            "negative subtracted whole",
            lambda positive, negative, true_cfg_scale: true_cfg_scale * positive - negative,
            "you subtract the whole negative velocity. What is scaled is the difference; the negative keeps the weight 1 - scale",
        ),
        Misconception(
            "only the difference",
            lambda positive, negative, true_cfg_scale: true_cfg_scale * (positive - negative),
            "you return only the scaled difference. It must be added to the negative velocity",
        ),
        Misconception(
            "averaged",
            lambda positive, negative, true_cfg_scale: (true_cfg_scale * positive + negative) / (true_cfg_scale + 1),
            "you take a weighted average, which lies between the two. Guidance goes beyond the positive, away from the negative",
        ),
    ),
)


# ---- what it costs ------------------------------------------------------------------------------------------------------


def network_passes(steps: int, guidance_scale: float, true_cfg_scale: float, negative_prompt: str | None) -> int:
    """How often FLUX.1-dev's transformer runs for one image."""
    return steps * (2 if true_cfg_scale > 1 and negative_prompt is not None else 1)


def settings() -> Iterator[dict[str, Any]]:
    for steps, guidance_scale, true_cfg_scale, negative_prompt in (
        (28, 3.5, 1.0, None),
        (50, 1.0, 4.0, "blurry"),
        (28, 3.5, 4.0, None),
        (20, 2.0, 1.0, "blurry"),
        (4, 0.0, 1.5, ""),
        (10, 3.5, 0.5, "a cat"),
    ):
        yield {"steps": steps, "guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale, "negative_prompt": negative_prompt}


NETWORK_PASSES = Exercise(
    name="network_passes",
    reference=network_passes,
    cases=settings,
    misconceptions=(
        Misconception(
            "guidance doubles",
            lambda steps, guidance_scale, true_cfg_scale, negative_prompt: steps * (2 if guidance_scale > 1 else 1),
            "you let guidance_scale decide. In FLUX.1-dev it is one more input of the network and costs no pass",
        ),
        Misconception(
            "never doubles",
            lambda steps, guidance_scale, true_cfg_scale, negative_prompt: steps,
            "you count one pass for every step. True CFG adds a second one",
        ),
        Misconception(
            "the scale alone",
            lambda steps, guidance_scale, true_cfg_scale, negative_prompt: steps * (2 if true_cfg_scale > 1 else 1),
            "you look at true_cfg_scale only. Without a negative prompt there is nothing to run a second time",
        ),
        Misconception(
            "the negative prompt alone",
            lambda steps, guidance_scale, true_cfg_scale, negative_prompt: steps * (2 if negative_prompt is not None else 1),
            "you look at the negative prompt only. It is ignored unless true_cfg_scale is above 1",
        ),
        Misconception(
            "an empty negative prompt is none",
            lambda steps, guidance_scale, true_cfg_scale, negative_prompt: steps * (2 if true_cfg_scale > 1 and negative_prompt else 1),
            'you treat "" like None. An empty negative prompt is a prompt: it is encoded, and the second pass runs',
        ),
        Misconception(
            "any scale but 1",
            lambda steps, guidance_scale, true_cfg_scale, negative_prompt: (
                steps * (2 if true_cfg_scale != 1 and negative_prompt is not None else 1)
            ),
            "you count a second pass for every scale but 1. There is one only above 1; a scale of 0.5 is ignored",
        ),
    ),
)


# ---- the whole loop -----------------------------------------------------------------------------------------------------


def denoise(velocity_at: Callable[[Tensor, Tensor], Tensor], latents: Tensor, sigmas: Tensor) -> Tensor:
    """The latents at the last noise level: Euler steps along `velocity_at(latents, sigma)` through all of `sigmas`."""
    for sigma, sigma_next in pairwise(sigmas):
        latents = latents + (sigma_next - sigma) * velocity_at(latents, sigma)
    return latents


def curved(latents: Tensor, sigma: Tensor) -> Tensor:
    """A velocity that depends on both, as the network's does."""
    return 0.5 * latents - torch.cos(3 * latents) + sigma**2


def walks() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    for shape, dtype, levels in (
        ((1, 6, 8), torch.float32, (1.0, 0.75, 0.5, 0.25, 0.0)),
        ((2, 3, 5), torch.float64, (1.0, 0.9, 0.6, 0.0)),
        ((1, 4, 4), torch.float32, (0.7, 0.4, 0.15, 0.0)),
    ):
        yield {"velocity_at": curved, "latents": drawn(shape, dtype, generator), "sigmas": torch.tensor(levels, dtype=dtype)}


def going_back(velocity_at: Callable, latents: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, sigma_next in pairwise(sigmas):
        latents = latents + (sigma - sigma_next) * velocity_at(latents, sigma)
    return latents


def asked_at_the_next(velocity_at: Callable, latents: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, sigma_next in pairwise(sigmas):
        latents = latents + (sigma_next - sigma) * velocity_at(latents, sigma_next)
    return latents


def asked_once(velocity_at: Callable, latents: Tensor, sigmas: Tensor) -> Tensor:
    return latents + (sigmas[-1] - sigmas[0]) * velocity_at(latents, sigmas[0])


def asked_about_the_start(velocity_at: Callable, latents: Tensor, sigmas: Tensor) -> Tensor:
    return latents + sum((sigma_next - sigma) * velocity_at(latents, sigma) for sigma, sigma_next in pairwise(sigmas))


def last_step_missing(velocity_at: Callable, latents: Tensor, sigmas: Tensor) -> Tensor:
    return denoise(velocity_at, latents, sigmas[:-1])


def jumping(velocity_at: Callable, latents: Tensor, sigmas: Tensor) -> Tensor:
    for sigma in sigmas[:-1]:
        latents = latents - sigma * velocity_at(latents, sigma)
    return latents


DENOISE = Exercise(
    name="denoise",
    reference=denoise,
    cases=walks,
    misconceptions=(
        Misconception("backwards", going_back, "you walk back towards the noise: sigma_next - sigma is negative, as it must be"),
        Misconception(
            "asked at the next level",
            asked_at_the_next,
            "you ask for the velocity at sigma_next. The latents are still at sigma: tell the network the level that they are at",
        ),
        Misconception(
            "asked once",
            asked_once,
            "you take one step from the first level to the last. The path bends: ask again after every step",
        ),
        Misconception(
            "asked about the start",
            asked_about_the_start,
            "you ask about the starting latents in every step. Ask about those that the last step arrived at",
        ),
        Misconception(
            "last step missing",
            last_step_missing,
            "you stop one step early, and noise is left in the picture. The last step goes to the last of `sigmas`, which is 0",
        ),
        Misconception(
            "jumping to the end",
            jumping,
            "in every step you go all the way to sigma 0, to the predicted picture. Go only as far as the next level",
        ),
    ),
)

EXERCISES = (PREDICTED_PICTURE, TRUE_CFG, NETWORK_PASSES, DENOISE)
