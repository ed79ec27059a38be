"""The exercises of lesson 00."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception
from flux_lab.latents import PATCH
from flux_lab.prompt import MAX_SEQUENCE_LENGTH

SCALE = 8  # pixels for each latent, along one side
SIDE = SCALE * PATCH  # pixels for each token, along one side


# ---- how many tokens a picture has --------------------------------------------------------------------------------------


def image_tokens(height: int, width: int) -> int:
    """Image tokens of a picture of `height` x `width` pixels, multiples of 16."""
    return (height // SIDE) * (width // SIDE)


def sizes() -> Iterator[dict[str, int]]:
    for height, width in ((128, 128), (1024, 1024), (768, 1360), (64, 512), (1920, 1088)):
        yield {"height": height, "width": width}


IMAGE_TOKENS = Exercise(
    name="image_tokens",
    reference=image_tokens,
    cases=sizes,
    misconceptions=(
        Misconception(
            "no packing",
            lambda height, width: (height // SCALE) * (width // SCALE),
            "you counted latents. A token is a 2 x 2 patch of latents, so there are four times fewer",
        ),
        Misconception(
            "no autoencoder",
            lambda height, width: (height // PATCH) * (width // PATCH),
            "you cut pixels into 2 x 2 patches. The patches are cut from latents, which are 8 times smaller along each side",
        ),
        Misconception(
            "divided once",
            lambda height, width: height * width // SIDE,
            "you divided the number of pixels by 16. Each of the two sides is divided by 16, the area by 256",
        ),
        Misconception(
            "text counted too",
            lambda height, width: (height // SIDE) * (width // SIDE) + MAX_SEQUENCE_LENGTH,
            f"you added {MAX_SEQUENCE_LENGTH} text tokens. The network reads them too, but only those of the picture are asked for",
        ),
        Misconception(
            "height twice",
            lambda height, width: (height // SIDE) ** 2,
            "you used the height for both sides: right for squares only",
        ),
        Misconception(
            "width twice",
            lambda height, width: (width // SIDE) ** 2,
            "you used the width for both sides: right for squares only",
        ),
    ),
)


# ---- one Euler step -----------------------------------------------------------------------------------------------------


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The latents at noise level `sigma_next`, from those at `sigma` and the velocity there."""
    return latents + (sigma_next - sigma) * velocity


def steps() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in (((1, 64, 64), torch.float32), ((2, 5, 12), torch.float64), ((1, 3, 64), torch.bfloat16)):
        latents, velocity = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        for sigma, sigma_next in ((1.0, 0.75), (0.4375, 0.3125), (0.125, 0.0)):
            yield {"latents": latents, "velocity": velocity, "sigma": sigma, "sigma_next": sigma_next}


EULER_STEP = Exercise(
    name="euler_step",
    reference=euler_step,
    cases=steps,
    misconceptions=(
        Misconception(
            "backwards",
            lambda latents, velocity, sigma, sigma_next: latents + (sigma - sigma_next) * velocity,
            "you walk back towards the noise. The velocity points from the picture to the noise, and sigma_next - sigma is negative",
        ),
        Misconception(
            "roles swapped",
            lambda latents, velocity, sigma, sigma_next: velocity + (sigma_next - sigma) * latents,
            "latents and velocity are swapped. This line is printed in some write-ups; it moves the velocity along the latents",
        ),
        Misconception(
            "all the way",
            lambda latents, velocity, sigma, sigma_next: latents - sigma * velocity,
            "you jump to sigma 0 at once. That is the predicted picture x0; one step goes only as far as sigma_next",
        ),
        Misconception(
            "no step size",
            lambda latents, velocity, sigma, sigma_next: latents - velocity,
            "you take off the whole velocity. It is a distance for each unit of sigma: multiply it by the change of sigma",
        ),
        Misconception(
            "absolute level",
            lambda latents, velocity, sigma, sigma_next: latents + sigma_next * velocity,
            "you multiply by the noise level sigma_next. What counts is the change, sigma_next - sigma",
        ),
        Misconception(
            "velocity unused",
            lambda latents, velocity, sigma, sigma_next: latents * sigma_next / sigma,
            "you shrink the latents by sigma_next / sigma. That treats them as noise only, and leaves the velocity unused",
        ),
    ),
)

EXERCISES = (IMAGE_TOKENS, EULER_STEP)
