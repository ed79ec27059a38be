"""The exercises of lesson 05."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_lab.embeddings import get_timestep_embedding
from flux_lab.exercises.checking import Exercise, Misconception
from flux_lab.normalization import EPS, modulate

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PERIOD = 10000.0


# ---- sinusoids of a time ------------------------------------------------------------------------------------------------


def time_sinusoids(t: Tensor, channels: int) -> Tensor:
    """[batch] -> [batch, channels], float32: cosines, then sines, of t 10000^(-i / half) for i = 0 ... half - 1."""
    return get_timestep_embedding(t, channels)


def angles(t: Tensor, channels: int, last: float | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`last` stands in the exponent's denominator, by default half the channels."""
    frequencies = torch.exp(-math.log(PERIOD) * torch.arange(channels // 2, dtype=torch.float32) / (last or channels // 2))
    return (t[:, None].to(dtype) * frequencies.to(dtype)).float()


def cos_sin(angle: Tensor) -> Tensor:
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def times() -> Iterator[dict[str, Any]]:
    yield {"t": torch.tensor([0.0, 1.0, 500.0, 1000.0]), "channels": 256}
    yield {"t": torch.tensor([3.5, 731.25], dtype=torch.float64), "channels": 10}
    yield {"t": torch.tensor([976.0, 12.5, 0.25], dtype=torch.bfloat16), "channels": 32}


TIME_SINUSOIDS = Exercise(
    name="time_sinusoids",
    reference=time_sinusoids,
    cases=times,
    # A frequency that is rounded in another way turns a time of 1000 by up to 1e-4.
    tolerance=1e-3,
    misconceptions=(
        Misconception(
            "sines first",
            lambda t, channels: torch.cat([angles(t, channels).sin(), angles(t, channels).cos()], dim=-1),
            "sines and cosines are swapped. FLUX puts the cosines first",
        ),
        Misconception(
            "interleaved",
            lambda t, channels: torch.stack([angles(t, channels).cos(), angles(t, channels).sin()], dim=-1).flatten(1),
            "cosine and sine of one frequency stand side by side. Here all cosines come first, then all sines",
        ),
        Misconception(
            "all channels in the exponent",
            lambda t, channels: cos_sin(angles(t, channels, last=channels)),
            "you divide i by the number of channels. There are half as many frequencies: divide by half, or they end at 1/100",
        ),
        Misconception(
            "one step too far",
            lambda t, channels: cos_sin(angles(t, channels, last=channels // 2 - 1)),
            "your last frequency is exactly 1/10000. Divide i by half, not by half - 1: FLUX's frequency shift is 0",
        ),
        Misconception(
            "frequencies turned round",
            lambda t, channels: cos_sin(angles(t, channels).flip(1)),
            "the slowest wave comes first. The first frequency is 1, the slowest comes last",
        ),
        Misconception(
            "times 1000 again",
            lambda t, channels: cos_sin(angles(1000 * t.float(), channels)),
            "you multiply by 1000. The argument t is 1000 sigma already",
        ),
        Misconception(
            "in the dtype of t",
            lambda t, channels: cos_sin(angles(t, channels, dtype=t.dtype)),
            "you multiply in the dtype of t. In bfloat16 an angle of 976 has steps of 4, more than half a turn: compute in float32",
        ),
    ),
)


# ---- a modulated layer norm ---------------------------------------------------------------------------------------------


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [batch, sequence, dim], shift and scale [batch, dim]: layer norm without weights, then (1 + scale), then shift."""
    return modulate(normed(x), shift, scale)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def without_unit(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * scale[:, None] + shift[:, None]


def over_tokens(x: Tensor) -> Tensor:
    return (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, keepdim=True, correction=0) + EPS).sqrt()


def without_mean(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


def streams() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for (batch, sequence, dim), dtype in zip(((1, 4, 6), (2, 5, 8), (3, 2, 12)), DTYPES, strict=True):
        x, shift, scale = (torch.randn(shape, generator=generator) for shape in ((batch, sequence, dim), (batch, dim), (batch, dim)))
        # Small tokens, for which eps matters.
        yield {"x": (0.1 * x + 0.07).to(dtype), "shift": shift.to(dtype), "scale": scale.to(dtype)}


MODULATED = Exercise(
    name="modulated",
    reference=modulated,
    cases=streams,
    misconceptions=(
        Misconception(
            "scale without 1",
            lambda x, shift, scale: without_unit(normed(x), shift, scale),
            "you multiply by scale. It is 1 + scale, so that a scale of 0 leaves the tokens as they are",
        ),
        Misconception(
            "shift and scale swapped",
            lambda x, shift, scale: modulate(normed(x), scale, shift),
            "shift and scale are swapped: you multiply by 1 + shift and add scale",
        ),
        Misconception(
            "no norm",
            lambda x, shift, scale: modulate(x, shift, scale),
            "the tokens are not normalised. Layer norm comes first, then scale and shift",
        ),
        Misconception(
            "norm last",
            lambda x, shift, scale: normed(modulate(x, shift, scale)),
            "you normalise after the modulation, which undoes most of it. Layer norm comes first",
        ),
        Misconception(
            "over the tokens",
            lambda x, shift, scale: modulate(over_tokens(x), shift, scale),
            "you normalise each channel over the tokens. Layer norm takes one token at a time, over its channels",
        ),
        Misconception(
            "mean kept",
            lambda x, shift, scale: modulate(without_mean(x), shift, scale),
            "the mean is still there: that is an RMS norm. A layer norm takes the mean off first",
        ),
        Misconception(
            "shift scaled too",
            lambda x, shift, scale: (normed(x) + shift[:, None]) * (1 + scale[:, None]),
            "you add the shift before you scale, so it is scaled too. Scale first, then shift",
        ),
        Misconception(
            "default eps",
            lambda x, shift, scale: modulate(F.layer_norm(x, x.shape[-1:]), shift, scale),
            "your eps is 1e-5, the default of F.layer_norm. FLUX's is 1e-6",
        ),
    ),
)


# ---- a gated sub-layer --------------------------------------------------------------------------------------------------

Sublayer = Callable[[Tensor], Tensor]


def gated_sublayer(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    """x + gate * sublayer(modulated x), with `signals` [batch, 3 dim] holding shift, scale and gate side by side."""
    shift, scale, gate = chunks(signals)
    return x + gate * sublayer(inner(x, shift, scale))


def chunks(signals: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate, each [batch, 1, dim]."""
    return signals[:, None].chunk(3, dim=2)


def inner(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return normed(x) * (1 + scale) + shift


def in_order(x: Tensor, sublayer: Sublayer, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return x + gate * sublayer(inner(x, shift, scale))


def mixing(x: Tensor) -> Tensor:
    """Stands for attention or an MLP: not linear, and every token sees those before it."""
    return torch.tanh(x).cumsum(dim=1)


def squaring(x: Tensor) -> Tensor:
    return x.square() - x.mean(dim=1, keepdim=True)


def sublayers() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    shapes, dtypes = ((1, 4, 6), (2, 3, 8), (3, 5, 10)), (torch.float32, torch.float64, torch.float16)
    for (batch, sequence, dim), dtype in zip(shapes, dtypes, strict=True):
        x, signals = torch.randn(batch, sequence, dim, generator=generator), torch.randn(batch, 3 * dim, generator=generator)
        for sublayer in (mixing, squaring):
            yield {"x": (2 * x + 1).to(dtype), "signals": signals.to(dtype), "sublayer": sublayer}


def gate_on_input(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    shift, scale, gate = chunks(signals)
    return x + sublayer(gate * inner(x, shift, scale))


def no_residual(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    shift, scale, gate = chunks(signals)
    return gate * sublayer(inner(x, shift, scale))


def gate_on_stream(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    shift, scale, gate = chunks(signals)
    return gate * (x + sublayer(inner(x, shift, scale)))


def residual_from_norm(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    shift, scale, gate = chunks(signals)
    modulated_x = inner(x, shift, scale)
    return modulated_x + gate * sublayer(modulated_x)


def all_on_output(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    shift, scale, gate = chunks(signals)
    return x + gate * ((1 + scale) * sublayer(normed(x)) + shift)


def one_plus_gate(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    shift, scale, gate = chunks(signals)
    return x + (1 + gate) * sublayer(inner(x, shift, scale))


def scale_first(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    scale, shift, gate = chunks(signals)
    return in_order(x, sublayer, shift, scale, gate)


def gate_first(x: Tensor, signals: Tensor, sublayer: Sublayer) -> Tensor:
    gate, shift, scale = chunks(signals)
    return in_order(x, sublayer, shift, scale, gate)


GATED_SUBLAYER = Exercise(
    name="gated_sublayer",
    reference=gated_sublayer,
    cases=sublayers,
    # In float16 the order of the products shows.
    tolerance=2e-2,
    misconceptions=(
        Misconception(
            "gate on the input",
            gate_on_input,
            "the gate multiplies what goes into the sub-layer. Shift and scale act on its input, the gate on its output",
        ),
        Misconception(
            "shift and scale on the output",
            all_on_output,
            "shift and scale act on what comes out of the sub-layer. They act on its input; only the gate acts on its output",
        ),
        Misconception("no residual", no_residual, "x itself is missing: the gated output is added to the stream, it does not replace it"),
        Misconception(
            "gate on the stream",
            gate_on_stream,
            "the gate multiplies the stream too. Only the sub-layer's output is gated, then x is added",
        ),
        Misconception(
            "residual from the norm",
            residual_from_norm,
            "you add the output to the normalised tokens. It is added to x as it came: only the sub-layer sees the norm",
        ),
        Misconception(
            "1 + gate",
            one_plus_gate,
            "you multiply by 1 + gate. The 1 belongs to the scale; a gate of 0 must close the sub-layer",
        ),
        Misconception("scale first", scale_first, "you took scale, shift, gate. In the blocks the order is shift, scale, gate"),
        Misconception("gate first", gate_first, "you took gate, shift, scale. In the blocks the order is shift, scale, gate"),
    ),
)

EXERCISES = (TIME_SINUSOIDS, MODULATED, GATED_SUBLAYER)
