"""The exercises of lesson 04."""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception

# To compute in float64 is part of the task where this is the tolerance.
FLOAT64 = 1e-9


def random_numbers(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- frequencies --------------------------------------------------------------------------------------------------------


def rope_frequencies(dim: int, theta: float) -> Tensor:
    """The angle that each pair turns for one position, in radians: theta^(-2i/dim) for i = 0 ... dim/2 - 1, float64 [dim/2]."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def ladders() -> Iterator[dict[str, Any]]:
    for dim, theta in ((16, 10000.0), (56, 10000.0), (14, 10000.0), (4, 500.0), (8, 100.0)):
        yield {"dim": dim, "theta": theta}


ROPE_FREQUENCIES = Exercise(
    name="rope_frequencies",
    reference=rope_frequencies,
    cases=ladders,
    tolerance=FLOAT64,
    misconceptions=(
        Misconception(
            "wavelengths",
            lambda dim, theta: theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim),
            "you left out the minus sign: these grow. The first pair is the fastest, with 1 radian for one position; all others are slower",
        ),
        Misconception(
            "half the exponent",
            lambda dim, theta: theta ** (-torch.arange(dim // 2, dtype=torch.float64) / dim),
            "your exponent is -i/dim. Two channels make a pair, so it is -2i/dim; your ladder goes only half the way",
        ),
        Misconception(
            "end included",
            lambda dim, theta: theta ** -torch.linspace(0, 1, dim // 2, dtype=torch.float64),
            "your slowest pair has the frequency 1/theta: you divided by dim - 2. The ladder stops one step before that",
        ),
        Misconception(
            "one for each channel",
            lambda dim, theta: repeat(rope_frequencies(dim, theta), "pairs -> (pairs 2)"),
            "you gave one frequency for each channel. A pair shares one, so there are dim / 2",
        ),
        Misconception(
            "even steps",
            lambda dim, theta: 1 - (1 - 1 / theta) * torch.arange(0, dim, 2, dtype=torch.float64) / dim,
            "your frequencies fall by the same amount each time. They fall by the same factor: i stands in the exponent",
        ),
        Misconception(
            "ones for the axis",
            lambda dim, theta: theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / 128),
            "you divided by 128, the width of FLUX.1-dev's head. Each axis has a ladder of its own, as long as its own channels",
        ),
    ),
)


# ---- turning the pairs --------------------------------------------------------------------------------------------------


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of every token, [tokens, dim], by angles in radians, [tokens, dim/2]."""
    return turned(x, angles.cos(), angles.sin())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours turned by an angle with this cosine and sine, [tokens, pairs] each."""
    first, second = rearrange(x, "tokens (pairs two) -> two tokens pairs", two=2)
    return rearrange([first * cos - second * sin, first * sin + second * cos], "two tokens pairs -> tokens (pairs two)")


def without_minus(x: Tensor, angles: Tensor) -> Tensor:
    """Both numbers of a pair are sums."""
    first, second = rearrange(x, "tokens (pairs two) -> two tokens pairs", two=2)
    cos, sin = angles.cos(), angles.sin()
    return rearrange([first * cos + second * sin, first * sin + second * cos], "two tokens pairs -> tokens (pairs two)")


def turned_halves(x: Tensor, angles: Tensor) -> Tensor:
    """The pairs are (x0, x_dim/2), (x1, x_dim/2+1), ..."""
    neighbours = rearrange(x, "tokens (two pairs) -> tokens (pairs two)", two=2)
    return rearrange(rotate_pairs(neighbours, angles), "tokens (pairs two) -> tokens (two pairs)", two=2)


def turned_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours turned, with a cosine and a sine for each channel, [tokens, dim] each."""
    first, second = rearrange(x, "tokens (pairs two) -> two tokens pairs", two=2)
    return x * cos + rearrange([-second, first], "two tokens pairs -> tokens (pairs two)") * sin


def some_pairs() -> Iterator[dict[str, Tensor]]:
    for seed, (tokens, dim, dtype) in enumerate(((5, 8, torch.float32), (1, 6, torch.float64), (7, 16, torch.float32))):
        yield {
            "x": random_numbers(tokens, dim, dtype=dtype, seed=seed),
            "angles": 3 * random_numbers(tokens, dim // 2, dtype=dtype, seed=seed + 10),
        }


ROTATE_PAIRS = Exercise(
    name="rotate_pairs",
    reference=rotate_pairs,
    cases=some_pairs,
    misconceptions=(
        Misconception(
            "halves for neighbours",
            turned_halves,
            "you paired the first half of the channels with the second. Some models do; FLUX pairs neighbours: (x0, x1), (x2, x3), ...",
        ),
        Misconception(
            "other direction",
            lambda x, angles: turned(x, angles.cos(), -angles.sin()),
            "you turned clockwise. The first number becomes x0 cos - x1 sin, the second x0 sin + x1 cos",
        ),
        Misconception(
            "minus forgotten",
            without_minus,
            "the minus sign of the first number is missing: x0 cos - x1 sin. Without it lengths change, and this is no rotation",
        ),
        Misconception(
            "sine and cosine swapped",
            lambda x, angles: turned(x, angles.sin(), angles.cos()),
            "sine and cosine are swapped. An angle of 0 must change nothing, and the cosine of 0 is 1",
        ),
        Misconception(
            "table tiled",
            lambda x, angles: turned_channels(x, angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)),
            "you laid the whole table out twice, (a, b, a, b). Each value is repeated for its pair: (a, a, b, b)",
        ),
        Misconception(
            "numbers in two halves",
            lambda x, angles: rearrange(rotate_pairs(x, angles), "tokens (pairs two) -> tokens (two pairs)", two=2),
            "the pairs are turned rightly, but you put all first numbers before all second ones. Each goes back to where it was",
        ),
    ),
)


# ---- three axes ---------------------------------------------------------------------------------------------------------


def head_angles(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """The angle of every pair of a head for every token, [tokens, head_dim/2], from position ids [tokens, axes] in float64."""
    return torch.cat([torch.outer(ids[:, axis], rope_frequencies(dim, theta)) for axis, dim in enumerate(axes_dim)], dim=1)


def one_ladder(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """Every pair turns by its axis, but the frequencies fall through the whole head."""
    numbers = torch.cat([repeat(ids[:, axis], "tokens -> tokens pairs", pairs=dim // 2) for axis, dim in enumerate(axes_dim)], dim=1)
    return numbers * rope_frequencies(sum(axes_dim), theta)


def some_ids() -> Iterator[dict[str, Any]]:
    for seed, axes_dim in enumerate(((4, 14, 14), (16, 56, 56), (2, 6, 4))):
        ids = torch.randint(0, 40, (9, 3), generator=torch.Generator().manual_seed(seed)).double()
        yield {"ids": ids, "axes_dim": axes_dim, "theta": 10000.0 if seed else 500.0}


HEAD_ANGLES = Exercise(
    name="head_angles",
    reference=head_angles,
    cases=some_ids,
    tolerance=FLOAT64,
    misconceptions=(
        Misconception(
            "one ladder",
            one_ladder,
            "your frequencies fall once, through the whole head. Each axis begins anew with 1 radian for one position",
        ),
        Misconception(
            "row and column swapped",
            lambda ids, axes_dim, theta: head_angles(ids[:, [0, 2, 1]], axes_dim, theta),
            "row and column are swapped. After the unused axis comes the row, then the column",
        ),
        Misconception(
            "last axis first",
            lambda ids, axes_dim, theta: torch.cat(
                [torch.outer(ids[:, axis], rope_frequencies(axes_dim[axis], theta)) for axis in (2, 1, 0)], dim=1
            ),
            "the axes stand in the reverse order. The first of them has the first pairs",
        ),
        Misconception(
            "ids added",
            lambda ids, axes_dim, theta: torch.outer(ids.sum(dim=1), rope_frequencies(sum(axes_dim), theta)),
            "you added the three numbers. Then (0, 1, 2) and (0, 2, 1) are one place. Each axis turns pairs of its own",
        ),
        Misconception(
            "unused axis left out",
            lambda ids, axes_dim, theta: head_angles(ids, axes_dim, theta)[:, axes_dim[0] // 2 :],
            "the pairs of the first axis are missing. They are never turned in FLUX.1, but they are part of the head",
        ),
        Misconception(
            "one for each channel",
            lambda ids, axes_dim, theta: repeat(head_angles(ids, axes_dim, theta), "tokens pairs -> tokens (pairs 2)"),
            "you gave one angle for each channel. Here one for each pair is asked for",
        ),
    ),
)

EXERCISES = (ROPE_FREQUENCIES, ROTATE_PAIRS, HEAD_ANGLES)
