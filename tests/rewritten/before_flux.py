"""Lesson 12."""

import itertools
import math

import torch
from torch import Tensor


def product_up_to(betas: Tensor, timestep: int) -> float:
    return math.prod((1 - betas[: timestep + 1].double()).tolist())


def one_by_one(picture: Tensor, noise: Tensor, timesteps: Tensor, weights) -> Tensor:
    """Each of a batch with its own two weights."""
    pairs = [weights(timestep) for timestep in timesteps.tolist()]
    return torch.stack([signal * x + spread * n for x, n, (signal, spread) in zip(picture, noise, pairs, strict=True)])


def roots(kept: float) -> tuple[float, float]:
    return math.sqrt(kept) if kept >= 0 else math.nan, math.sqrt(1 - kept)


def walk(side: int, widths: tuple[int, ...], layers: int) -> list[list[tuple[int, int]]]:
    """The layers' results of every level."""
    return [[(width, side >> level)] * layers for level, width in enumerate(widths)]


def halved(side: int, widths: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(width, side >> (level + 1)) for level, width in enumerate(widths)]


def joined(first: list, levels: list[list], after: list) -> list:
    """The first, then of each level its layers and what follows them."""
    return first + list(itertools.chain.from_iterable(level + ([after[i]] if i < len(after) else []) for i, level in enumerate(levels)))


REWRITTEN = {
    ("noised_at", "only the last step's noise"): lambda x, n, t, betas: one_by_one(x, n, t, lambda i: roots(1 - betas[i].item())),
    ("noised_at", "added up, not multiplied"): lambda x, n, t, betas: one_by_one(
        x, n, t, lambda i: roots(1 - betas[: i + 1].double().sum().item())
    ),
    ("noised_at", "no roots"): lambda x, n, t, betas: one_by_one(x, n, t, lambda i: (product_up_to(betas, i), 1 - product_up_to(betas, i))),
    ("noised_at", "FLUX's straight line"): lambda x, n, t, betas: one_by_one(x, n, t, lambda i: (1 - i / len(betas), i / len(betas))),
    ("noised_at", "weights swapped"): lambda x, n, t, betas: one_by_one(x, n, t, lambda i: roots(product_up_to(betas, i))[::-1]),
    ("noised_at", "one timestep late"): lambda x, n, t, betas: one_by_one(x, n, t, lambda i: roots(product_up_to(betas, i + 1))),
    ("noised_at", "noise not scaled"): lambda x, n, t, betas: one_by_one(x, n, t, lambda i: (math.sqrt(product_up_to(betas, i)), 1.0)),
    ("flux_velocity", "other way round"): lambda x, n, a: x / a**0.5 - n * (1 + ((1 - a) / a) ** 0.5),
    ("flux_velocity", "the picture itself"): lambda x, n, a: x / math.sqrt(a) - math.sqrt(1 / a - 1) * n,
    ("flux_velocity", "SD's v"): lambda x, n, a: (n - math.sqrt(1 - a) * x) / math.sqrt(a),
    ("flux_velocity", "noise minus sample"): lambda x, n, a: torch.sub(n, x),
    ("flux_velocity", "no division"): lambda x, n, a: (1 + math.sqrt(1 - a)) * n - x,
    ("flux_velocity", "no roots"): lambda x, n, a: n * (1 + (1 - a) / a) - x / a,
    ("flux_velocity", "FLUX's mixture"): lambda x, n, a: n / math.sqrt(a) - x / math.sqrt(a),
    ("guided_noise", "halves swapped"): lambda both, s: both[len(both) // 2 :] * (1 - s) + s * both[: len(both) // 2],
    ("guided_noise", "counted from the prompt"): lambda both, s: (1 + s) * both[len(both) // 2 :] - s * both[: len(both) // 2],
    ("guided_noise", "only multiplied"): lambda both, s: both[len(both) // 2 :] * s,
    ("guided_noise", "difference alone"): lambda both, s: s * both[len(both) // 2 :] - s * both[: len(both) // 2],
    ("guided_noise", "averaged"): lambda both, s: both[: len(both) // 2] / (1 + s) + both[len(both) // 2 :] * (s / (1 + s)),
    ("guided_noise", "pairs side by side"): lambda both, s: (
        (1 - s) * both.unflatten(0, (-1, 2))[:, 0] + s * both.unflatten(0, (-1, 2))[:, 1]
    ),
    ("skip_shapes", "first convolution forgotten"): lambda side, widths, layers: joined(
        [], walk(side, widths, layers), halved(side, widths)[:-1]
    ),
    ("skip_shapes", "downsamplers forgotten"): lambda side, widths, layers: joined([(widths[0], side)], walk(side, widths, layers), []),
    ("skip_shapes", "last level halves too"): lambda side, widths, layers: joined(
        [(widths[0], side)], walk(side, widths, layers), halved(side, widths)
    ),
    ("skip_shapes", "downsampler widens"): lambda side, widths, layers: joined(
        [(widths[0], side)],
        walk(side, widths, layers),
        [(following, side >> (level + 1)) for level, following in enumerate(widths[1:])],
    ),
    ("skip_shapes", "layers of the way up"): lambda side, widths, layers: joined(
        [(widths[0], side)], walk(side, widths, layers + 1), halved(side, widths)[:-1]
    ),
    ("skip_shapes", "newest first"): lambda side, widths, layers: list(
        reversed(joined([(widths[0], side)], walk(side, widths, layers), halved(side, widths)[:-1]))
    ),
    ("skip_shapes", "one a level"): lambda side, widths, layers: [(width, side >> level) for level, width in enumerate(widths)],
}
