"""Lesson 04."""

import math

import torch


def listed(count, frequency):
    return torch.tensor([frequency(i) for i in range(count)], dtype=torch.float64)


def pair_by_pair(x, angles, turn, place=None):
    """Turn one pair after the other. `place(pair, pairs)`: the two channels that its numbers come from and go to."""
    place = place or (lambda pair, pairs: (2 * pair, 2 * pair + 1))
    result = torch.empty_like(x)
    for pair in range(angles.shape[1]):
        one, two = place(pair, angles.shape[1])
        result[:, one], result[:, two] = turn(x[:, one], x[:, two], angles[:, pair])
    return result


def complex_turn(a, b, angle):
    number = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return number.real, number.imag


def tiled(x, angles):
    swapped = x.clone()
    swapped[:, 0::2], swapped[:, 1::2] = -x[:, 1::2], x[:, 0::2]
    twice = torch.cat([angles, angles], dim=1)
    return x * twice.cos() + swapped * twice.sin()


def pair_angles(ids, entries):
    """`entries`: for each pair the number of its axis, or a function of the ids, and its frequency."""
    return torch.stack([ids[:, axis] * frequency for axis, frequency in entries], dim=1)


def ladder(dim, theta):
    return [math.exp(-2 * i / dim * math.log(theta)) for i in range(dim // 2)]


def ladders(axes, axes_dim, theta):
    return [(axis, frequency) for axis in axes for frequency in ladder(axes_dim[axis], theta)]


REWRITTEN = {
    ("rope_frequencies", "wavelengths"): lambda dim, theta: listed(dim // 2, lambda i: math.exp(2 * i / dim * math.log(theta))),
    ("rope_frequencies", "half the exponent"): lambda dim, theta: listed(dim // 2, lambda i: 1 / theta ** (i / dim)),
    ("rope_frequencies", "end included"): lambda dim, theta: listed(dim // 2, lambda i: theta ** (-2 * i / max(dim - 2, 1))),
    ("rope_frequencies", "one for each channel"): lambda dim, theta: listed(dim, lambda channel: theta ** (-2 * (channel // 2) / dim)),
    ("rope_frequencies", "even steps"): lambda dim, theta: listed(dim // 2, lambda i: 1 - 2 * i / dim + 2 * i / dim / theta),
    ("rope_frequencies", "ones for the axis"): lambda dim, theta: listed(dim // 2, lambda i: theta ** (-i / 64)),
    ("rotate_pairs", "halves for neighbours"): lambda x, angles: pair_by_pair(
        x, angles, complex_turn, place=lambda pair, pairs: (pair, pair + pairs)
    ),
    ("rotate_pairs", "other direction"): lambda x, angles: pair_by_pair(x, -angles, complex_turn),
    ("rotate_pairs", "minus forgotten"): lambda x, angles: pair_by_pair(
        x, angles, lambda a, b, angle: (torch.cos(angle) * a + b * torch.sin(angle), b * torch.cos(angle) + a * torch.sin(angle))
    ),
    ("rotate_pairs", "sine and cosine swapped"): lambda x, angles: pair_by_pair(
        x, angles, lambda a, b, angle: complex_turn(a, b, math.pi / 2 - angle)
    ),
    ("rotate_pairs", "table tiled"): tiled,
    ("rotate_pairs", "numbers in two halves"): lambda x, angles: torch.cat(complex_turn(x[:, 0::2], x[:, 1::2], angles), dim=1),
    ("head_angles", "one ladder"): lambda ids, axes_dim, theta: pair_angles(
        ids,
        zip(
            [axis for axis, dim in enumerate(axes_dim) for _ in range(dim // 2)],
            ladder(sum(axes_dim), theta),
            strict=True,
        ),
    ),
    ("head_angles", "row and column swapped"): lambda ids, axes_dim, theta: pair_angles(
        torch.stack([ids[:, 0], ids[:, 2], ids[:, 1]], dim=1), ladders((0, 1, 2), axes_dim, theta)
    ),
    ("head_angles", "last axis first"): lambda ids, axes_dim, theta: pair_angles(ids, ladders((2, 1, 0), axes_dim, theta)),
    ("head_angles", "ids added"): lambda ids, axes_dim, theta: (
        (ids @ torch.ones(3, 1, dtype=ids.dtype)) * torch.tensor(ladder(sum(axes_dim), theta), dtype=ids.dtype)
    ),
    ("head_angles", "unused axis left out"): lambda ids, axes_dim, theta: pair_angles(ids, ladders((1, 2), axes_dim, theta)),
    ("head_angles", "one for each channel"): lambda ids, axes_dim, theta: pair_angles(
        ids, [entry for entry in ladders((0, 1, 2), axes_dim, theta) for _ in range(2)]
    ),
}
