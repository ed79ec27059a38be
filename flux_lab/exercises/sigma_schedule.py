"""The exercises of lesson 09."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception
from flux_lab.scheduler import calculate_shift

LOW, HIGH = (256, 0.5), (4096, 1.15)  # the line's two fixed points: (image tokens, mu)


# ---- mu -----------------------------------------------------------------------------------------------------------------


def mu_for(tokens: Tensor) -> Tensor:
    """mu for each number of image tokens."""
    return calculate_shift(tokens)


def token_counts() -> Iterator[dict[str, Tensor]]:
    yield {"tokens": torch.tensor([64, 256, 1024, 4096, 9216], dtype=torch.float64)}
    yield {"tokens": torch.tensor([[576, 2304, 128], [300, 5000, 16384]], dtype=torch.float32)}


def line(low: tuple[float, float], high: tuple[float, float], at: Tensor) -> Tensor:
    """The straight line through two points."""
    return low[1] + (at - low[0]) * (high[1] - low[1]) / (high[0] - low[0])


MU_FOR = Exercise(
    name="mu_for",
    reference=mu_for,
    cases=token_counts,
    misconceptions=(
        Misconception(
            "clamped",
            lambda tokens: mu_for(tokens).clamp(LOW[1], HIGH[1]),
            "you stop the line at its two fixed points. It goes on beyond them: 64 tokens give less than 0.5",
        ),
        Misconception(
            "from zero tokens",
            lambda tokens: line((0, LOW[1]), (HIGH[0] - LOW[0], HIGH[1]), tokens),
            "your line is 0.5 at 0 tokens. It has to be 0.5 at 256 tokens: take 256 off the number of tokens first",
        ),
        Misconception(
            "proportional",
            lambda tokens: tokens * HIGH[1] / HIGH[0],
            "your line goes through (4096, 1.15) and the origin. It has to go through (256, 0.5) too",
        ),
        Misconception(
            "wrong maximum",
            lambda tokens: line(LOW, (HIGH[0], 1.16), tokens),
            "you took 1.16 for the upper point. This number is printed in some write-ups; FLUX.1 has 1.15",
        ),
        Misconception(
            "side in place of tokens",
            lambda tokens: line((LOW[0] ** 0.5, LOW[1]), (HIGH[0] ** 0.5, HIGH[1]), tokens.sqrt()),
            "your mu grows with the side of the picture. It is a line in the number of tokens",
        ),
        Misconception(
            "logarithm of tokens",
            lambda tokens: line((math.log(LOW[0]), LOW[1]), (math.log(HIGH[0]), HIGH[1]), tokens.log()),
            "your mu grows with the logarithm of the tokens. It is a line in the number of tokens itself",
        ),
    ),
)


# ---- the shift ----------------------------------------------------------------------------------------------------------


def shift_sigmas(sigmas: Tensor, mu: float) -> Tensor:
    """Noise levels moved towards 1 by mu."""
    strength = math.exp(mu)
    return strength * sigmas / (1 + (strength - 1) * sigmas)


def levels_to_shift() -> Iterator[dict[str, Any]]:
    yield {"sigmas": torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float32), "mu": 1.15}
    yield {"sigmas": torch.tensor([[1.0, 0.8, 0.6], [0.3, 0.2, 0.04]], dtype=torch.float64), "mu": 0.63}
    yield {"sigmas": torch.linspace(0.9, 0.1, 7, dtype=torch.float64), "mu": -0.3}


SHIFT_SIGMAS = Exercise(
    name="shift_sigmas",
    reference=shift_sigmas,
    cases=levels_to_shift,
    misconceptions=(
        Misconception(
            "mu itself",
            lambda sigmas, mu: mu / (mu + (1 / sigmas - 1)),
            "you used mu where e^mu stands. With mu = 0 nothing must change, and e^0 is 1",
        ),
        Misconception(
            "towards zero",
            lambda sigmas, mu: shift_sigmas(sigmas, -mu),
            "you moved the levels towards 0: that is the shift by -mu. A positive mu moves them towards 1",
        ),
        Misconception(
            "multiplied",
            lambda sigmas, mu: math.exp(mu) * sigmas,
            "you multiplied sigma by e^mu, and came out above 1. It is the odds, sigma / (1 - sigma), that are multiplied",
        ),
        Misconception(
            "added",
            lambda sigmas, mu: sigmas + mu,
            "you added mu to sigma. It is added to the logarithm of the odds, log(sigma / (1 - sigma))",
        ),
        Misconception(
            "odds kept",
            lambda sigmas, mu: math.exp(mu) / (1 / sigmas - 1),
            "you returned the new odds. Turn them back into a level: odds / (1 + odds)",
        ),
        Misconception(
            "without the one",
            lambda sigmas, mu: math.exp(mu) / (math.exp(mu) + 1 / sigmas),
            "you left out the -1 in (1/sigma - 1). Sigma = 1 must stay 1",
        ),
    ),
)


# ---- a whole schedule ---------------------------------------------------------------------------------------------------


def evenly_spaced(steps: int) -> Tensor:
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64)


def with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def noise_levels(steps: int, mu: float) -> Tensor:
    """All noise levels of a run, float32 [steps + 1], from 1 down to 0."""
    return with_zero(shift_sigmas(evenly_spaced(steps), mu))


def runs() -> Iterator[dict[str, Any]]:
    for steps, tokens in ((28, 4096), (4, 1024), (5, 64), (7, 2304), (1, 256)):
        yield {"steps": steps, "mu": calculate_shift(tokens)}


NOISE_LEVELS = Exercise(
    name="noise_levels",
    reference=noise_levels,
    cases=runs,
    misconceptions=(
        Misconception(
            "no final zero",
            lambda steps, mu: shift_sigmas(evenly_spaced(steps), mu).float(),
            "the final 0 is missing. The last step needs a level to arrive at: n steps have n + 1 levels",
        ),
        Misconception(
            "one step too few",
            lambda steps, mu: shift_sigmas(torch.linspace(1, 0, steps, dtype=torch.float64), mu).float(),
            "you spread the levels from 1 to 0 with the 0 counted as one of them. That leaves one step too few",
        ),
        Misconception(
            "not shifted",
            lambda steps, mu: with_zero(evenly_spaced(steps)),
            "the levels are evenly spaced: the shift is missing",
        ),
        Misconception(
            "shifted twice",
            lambda steps, mu: with_zero(shift_sigmas(evenly_spaced(steps), 2 * mu)),
            "the levels were shifted twice. Start from evenly spaced ones",
        ),
        Misconception(
            "upwards",
            lambda steps, mu: noise_levels(steps, mu).flip(0),
            "the levels rise. Sampling starts at the noise, sigma = 1, and walks down to 0",
        ),
        Misconception(
            "timesteps",
            lambda steps, mu: 1000 * noise_levels(steps, mu),
            "these are timesteps, 1000 times too large. Sigma lies between 0 and 1",
        ),
    ),
)


# ---- the forward process ------------------------------------------------------------------------------------------------


def over_batch(sigma: Tensor, like: Tensor) -> Tensor:
    """One number for each of the batch, with as many axes as `like`."""
    return sigma.reshape(len(sigma), *[1] * (like.ndim - 1))


def add_noise(picture: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The mixture of each picture with its noise, at its own noise level."""
    level = over_batch(sigma, picture)
    return (1 - level) * picture + level * noise


def mixtures() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    for shape, dtype, levels in (
        ((3, 5, 12), torch.float32, (0.25, 0.7, 0.9)),
        ((2, 16, 4, 6), torch.float64, (0.1, 0.6)),
        ((4, 7), torch.bfloat16, (0.5, 1.0, 0.0, 0.3)),
    ):
        picture, noise = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        yield {"picture": picture, "noise": noise, "sigma": torch.tensor(levels, dtype=dtype)}


ADD_NOISE = Exercise(
    name="add_noise",
    reference=add_noise,
    cases=mixtures,
    misconceptions=(
        Misconception(
            "roles swapped",
            lambda picture, noise, sigma: add_noise(noise, picture, sigma),
            "picture and noise are swapped. Sigma is the share of the noise: at sigma = 0 the picture must come out",
        ),
        Misconception(
            "picture not weakened",
            lambda picture, noise, sigma: picture + over_batch(sigma, picture) * noise,
            "you added noise and left the picture at full strength. Its share is 1 - sigma",
        ),
        Misconception(
            "constant variance",
            lambda picture, noise, sigma: (1 - over_batch(sigma, picture) ** 2).sqrt() * picture + over_batch(sigma, picture) * noise,
            "you kept the variance constant, sqrt(1 - sigma^2), as older diffusion models do. FLUX.1 walks a straight line: 1 - sigma",
        ),
        Misconception(
            "square roots",
            lambda picture, noise, sigma: (1 - over_batch(sigma, picture)).sqrt() * picture + over_batch(sigma, picture).sqrt() * noise,
            "you took square roots of both shares, as older diffusion models do. FLUX.1 walks a straight line: no roots",
        ),
        Misconception(
            "first level for all",
            lambda picture, noise, sigma: add_noise(picture, noise, sigma[:1].expand(len(picture))),
            "you used the first noise level for the whole batch. Each picture has its own",
        ),
    ),
)

EXERCISES = (MU_FOR, SHIFT_SIGMAS, NOISE_LEVELS, ADD_NOISE)
