"""Lesson 05."""

import math

import torch
from torch import nn


def waves(t, channels, divisor, factor=1.0):
    half = channels // 2
    return torch.outer(t.double() * factor, 10000.0 ** (-torch.arange(half, dtype=torch.float64) / divisor)).float()


def low_precision(t, channels):
    half = channels // 2
    angle = t.unsqueeze(1) * (10000.0 ** (-torch.arange(half).float() / half)).type(t.dtype)
    return torch.hstack([torch.cos(angle.float()), torch.sin(angle.float())])


def interleaved(t, channels):
    out = torch.empty(len(t), channels)
    out[:, 0::2], out[:, 1::2] = waves(t, channels, channels / 2).cos(), waves(t, channels, channels / 2).sin()
    return out


def reversed_waves(t, channels):
    wave = waves(t, channels, channels / 2)[:, torch.arange(channels // 2 - 1, -1, -1)]
    return torch.hstack([wave.cos(), wave.sin()])


def too_fast(t, channels):
    # In float32 as an answer would: at an angle of a million the rounding shows.
    half = channels // 2
    wave = (t.float() * 1000)[:, None] * torch.exp(-torch.arange(half) * (math.log(10000) / half))
    return torch.hstack([wave.cos(), wave.sin()])


def norm(x):
    return nn.LayerNorm(x.shape[2], eps=1e-6, elementwise_affine=False)(x)


def row(x):
    return x.unsqueeze(1)


def by_hand(x):
    return (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, unbiased=False, keepdim=True) + 1e-6)


def thirds(signals):
    dim = signals.shape[1] // 3
    return [signals[:, None, part * dim : (part + 1) * dim] for part in range(3)]


def sub(x, signals, layer, order=(0, 1, 2)):
    a, b, c = (thirds(signals)[place] for place in order)
    return c * layer(norm(x) + b * norm(x) + a)


def gate_in(x, signals, layer):
    a, b, c = thirds(signals)
    return layer(c * a + c * norm(x) * (b + 1)) + x


def gate_on_both(x, signals, layer):
    return x * thirds(signals)[2] + sub(x, signals, layer)


def from_norm(x, signals, layer):
    a, b, _ = thirds(signals)
    return sub(x, signals, layer) + a + norm(x) + b * norm(x)


def after(x, signals, layer):
    a, b, c = thirds(signals)
    y = layer(norm(x))
    return x + c * a + c * (y + b * y)


def opened(x, signals, layer):
    a, b, c = thirds(signals)
    y = layer(a + norm(x) * (b + 1))
    return x + y + c * y


REWRITTEN = {
    ("time_sinusoids", "sines first"): lambda t, n: torch.cat([waves(t, n, n / 2).sin(), waves(t, n, n / 2).cos()], 1),
    ("time_sinusoids", "interleaved"): interleaved,
    ("time_sinusoids", "all channels in the exponent"): lambda t, n: torch.cat([waves(t, n, n).cos(), waves(t, n, n).sin()], 1),
    ("time_sinusoids", "one step too far"): lambda t, n: torch.hstack([waves(t, n, n / 2 - 1).cos(), waves(t, n, n / 2 - 1).sin()]),
    ("time_sinusoids", "frequencies turned round"): reversed_waves,
    ("time_sinusoids", "times 1000 again"): too_fast,
    ("time_sinusoids", "in the dtype of t"): low_precision,
    ("modulated", "scale without 1"): lambda x, shift, scale: torch.einsum("bsd,bd->bsd", norm(x), scale) + row(shift),
    ("modulated", "shift and scale swapped"): lambda x, shift, scale: norm(x) + norm(x) * row(shift) + row(scale),
    ("modulated", "no norm"): lambda x, shift, scale: torch.addcmul(row(shift), x, 1 + row(scale)),
    ("modulated", "norm last"): lambda x, shift, scale: norm(x + x * row(scale) + row(shift)),
    ("modulated", "over the tokens"): lambda x, shift, scale: by_hand(x) * (1 + row(scale)) + row(shift),
    ("modulated", "mean kept"): lambda x, shift, scale: (
        nn.RMSNorm(x.shape[2], eps=1e-6, elementwise_affine=False)(x) * (1 + row(scale)) + row(shift)
    ),
    ("modulated", "shift scaled too"): lambda x, shift, scale: norm(x) * (1 + row(scale)) + row(shift) + row(shift * scale),
    ("modulated", "default eps"): lambda x, shift, scale: (
        nn.LayerNorm(x.shape[2], elementwise_affine=False)(x) * (1 + row(scale)) + row(shift)
    ),
    ("gated_sublayer", "gate on the input"): gate_in,
    ("gated_sublayer", "shift and scale on the output"): after,
    ("gated_sublayer", "no residual"): sub,
    ("gated_sublayer", "gate on the stream"): gate_on_both,
    ("gated_sublayer", "residual from the norm"): from_norm,
    ("gated_sublayer", "1 + gate"): opened,
    ("gated_sublayer", "scale first"): lambda x, signals, layer: sub(x, signals, layer, (1, 0, 2)) + x,
    ("gated_sublayer", "gate first"): lambda x, signals, layer: sub(x, signals, layer, (1, 2, 0)) + x,
}
