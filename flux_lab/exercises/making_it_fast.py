"""The exercises of lesson 14."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception

# ---- how long work takes ------------------------------------------------------------------------------------------------


def predicted_seconds(flops: float, bytes_moved: float, calls: int, rate: float, bandwidth: float, call_seconds: float) -> float:
    """Seconds of `calls` operations: their fixed cost, and the longer of computing and moving."""
    return calls * call_seconds + max(flops / rate, bytes_moved / bandwidth)


def workloads() -> Iterator[dict[str, float]]:
    for flops, bytes_moved, calls, rate, bandwidth, call_seconds in (
        (1.2e9, 6e7, 1000, 1.5e11, 2e10, 3e-6),
        (6.5e6, 1.3e7, 77, 2e11, 1e10, 4e-6),
        (7.4e13, 2.4e10, 5000, 4e14, 3e12, 5e-6),
        (1e6, 4e6, 1000, 1e11, 2e10, 1e-5),
    ):
        yield {
            "flops": flops,
            "bytes_moved": bytes_moved,
            "calls": calls,
            "rate": rate,
            "bandwidth": bandwidth,
            "call_seconds": call_seconds,
        }


PREDICTED_SECONDS = Exercise(
    name="predicted_seconds",
    reference=predicted_seconds,
    cases=workloads,
    misconceptions=(
        Misconception(
            "sum",
            lambda flops, bytes_moved, calls, rate, bandwidth, call_seconds: calls * call_seconds + flops / rate + bytes_moved / bandwidth,
            "you added computing and moving. They happen at the same time: the longer of the two counts",
        ),
        Misconception(
            "the shorter",
            lambda flops, bytes_moved, calls, rate, bandwidth, call_seconds: (
                calls * call_seconds + min(flops / rate, bytes_moved / bandwidth)
            ),
            "you took the shorter of computing and moving. The work is done when both are, so the longer one counts",
        ),
        Misconception(
            "no calls",
            lambda flops, bytes_moved, calls, rate, bandwidth, call_seconds: max(flops / rate, bytes_moved / bandwidth),
            "the fixed cost of the calls is missing. For small tensors it is the largest part",
        ),
        Misconception(
            "FLOPs only",
            lambda flops, bytes_moved, calls, rate, bandwidth, call_seconds: calls * call_seconds + flops / rate,
            "you left the memory out. A product with one row reads every weight for two FLOPs",
        ),
        Misconception(
            "calls within the longest",
            lambda flops, bytes_moved, calls, rate, bandwidth, call_seconds: max(
                calls * call_seconds, flops / rate, bytes_moved / bandwidth
            ),
            "you let the calls run beside the work. On a CPU one call after the other is made, so their cost is added",
        ),
    ),
)


# ---- arithmetic intensity -----------------------------------------------------------------------------------------------


def linear_intensity(tokens: int, d_in: int, d_out: int, number_bytes: int) -> float:
    """FLOPs for each byte of a linear layer without bias: input and weights are read once, the output is written once."""
    return 2 * tokens * d_in * d_out / (number_bytes * (tokens * d_in + d_in * d_out + tokens * d_out))


def layers() -> Iterator[dict[str, int]]:
    for tokens, d_in, d_out, number_bytes in ((96, 96, 672, 4), (1, 96, 288, 4), (4608, 3072, 21504, 2), (7, 5, 11, 2)):
        yield {"tokens": tokens, "d_in": d_in, "d_out": d_out, "number_bytes": number_bytes}


LINEAR_INTENSITY = Exercise(
    name="linear_intensity",
    reference=linear_intensity,
    cases=layers,
    misconceptions=(
        Misconception(
            "multiplications only",
            lambda tokens, d_in, d_out, number_bytes: linear_intensity(tokens, d_in, d_out, number_bytes) / 2,
            "that is half. A multiplication and an addition are two FLOPs",
        ),
        Misconception(
            "weights only",
            lambda tokens, d_in, d_out, number_bytes: 2 * tokens / number_bytes,
            "you counted the weights alone. The input is read, and the output is written, too",
        ),
        Misconception(
            "no output",
            lambda tokens, d_in, d_out, number_bytes: 2 * tokens * d_in * d_out / (number_bytes * (tokens * d_in + d_in * d_out)),
            "the output is missing. It has to be written to memory",
        ),
        Misconception(
            "no weights",
            lambda tokens, d_in, d_out, number_bytes: 2 * tokens * d_in * d_out / (number_bytes * tokens * (d_in + d_out)),
            "the weights are missing. For few tokens they are nearly all that is moved",
        ),
        Misconception(
            "numbers, not bytes",
            lambda tokens, d_in, d_out, number_bytes: linear_intensity(tokens, d_in, d_out, 1),
            "you divided by numbers. Each takes number_bytes bytes: 4 in float32, 2 in bfloat16",
        ),
        Misconception(
            "upside down",
            lambda tokens, d_in, d_out, number_bytes: 1 / linear_intensity(tokens, d_in, d_out, number_bytes),
            "that is bytes for each FLOP. Intensity is FLOPs for each byte",
        ),
    ),
)


# ---- one layer in place of several --------------------------------------------------------------------------------------


def fuse_linears(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one linear layer that gives the outputs of all side by side."""
    return torch.cat(list(weights)), torch.cat(list(biases))


def projections() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(14)
    for d_in, outputs, dtype in ((4, (4, 4, 4), torch.float32), (5, (3, 3, 3, 8), torch.float64), (6, (2, 7), torch.float64)):
        weights = [torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).to(dtype) for d_out in outputs]
        biases = [torch.randn(d_out, generator=generator, dtype=torch.float64).to(dtype) for d_out in outputs]
        yield {"weights": weights, "biases": biases}


FUSE_LINEARS = Exercise(
    name="fuse_linears",
    reference=fuse_linears,
    cases=projections,
    misconceptions=(
        Misconception(
            "transposed",
            lambda weights, biases: (torch.cat(weights).T.contiguous(), torch.cat(biases)),
            "your weight is transposed. PyTorch keeps [outputs, inputs], so the outputs stand one below the other",
        ),
        Misconception(
            "other way round",
            lambda weights, biases: fuse_linears(weights[::-1], biases[::-1]),
            "you put the last layer first. Whoever splits the result expects the outputs in the order of the list",
        ),
        Misconception(
            "biases in another order",
            lambda weights, biases: (torch.cat(weights), torch.cat(biases[::-1])),
            "weights and biases are in different orders. Each output must keep its own bias",
        ),
        Misconception(
            "no biases",
            lambda weights, biases: (torch.cat(weights), torch.zeros_like(torch.cat(biases))),
            "the biases are zero. They are joined like the weights",
        ),
        Misconception(
            "averaged",
            lambda weights, biases: (torch.cat(weights) / len(weights), torch.cat(biases) / len(biases)),
            "you divided by the number of layers. Nothing is averaged: the layers only stand side by side",
        ),
    ),
)


# ---- all steps at once --------------------------------------------------------------------------------------------------


def modulation_table(conditioning: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What one adaptive norm says at all steps, [steps, signals, dim], with 1 added to every scale."""
    table = F.linear(F.silu(conditioning), weight, bias).unflatten(-1, (-1, conditioning.shape[-1]))
    table[:, 1::3] += 1
    return table


def conditionings() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(28)
    for steps, dim, signals, dtype in ((5, 4, 6, torch.float32), (3, 6, 3, torch.float64), (4, 3, 6, torch.float64)):
        shapes = {"conditioning": (steps, dim), "weight": (signals * dim, dim), "bias": (signals * dim,)}
        yield {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def table_of(signal: Tensor, weight: Tensor, bias: Tensor, ones: slice) -> Tensor:
    """The table from what goes into the layer, with 1 added to the signals `ones`."""
    table = F.linear(signal, weight, bias).unflatten(-1, (-1, signal.shape[-1]))
    table[:, ones] += 1
    return table


def split_the_other_way(conditioning: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    signals = F.linear(F.silu(conditioning), weight, bias).unflatten(-1, (conditioning.shape[-1], -1)).transpose(1, 2).contiguous()
    signals[:, 1::3] += 1
    return signals


MODULATION_TABLE = Exercise(
    name="modulation_table",
    reference=modulation_table,
    cases=conditionings,
    misconceptions=(
        Misconception(
            "no SiLU",
            lambda conditioning, weight, bias: table_of(conditioning, weight, bias, slice(1, None, 3)),
            "the SiLU is missing. It stands in front of the linear layer",
        ),
        Misconception(
            "1 not added",
            lambda conditioning, weight, bias: table_of(F.silu(conditioning), weight, bias, slice(0, 0)),
            "you did not add 1 to the scales. The norm is multiplied by 1 + scale",
        ),
        Misconception(
            "1 added to the shifts",
            lambda conditioning, weight, bias: table_of(F.silu(conditioning), weight, bias, slice(0, None, 3)),
            "you added 1 to the shifts. The order is shift, scale, gate, and again: the scales are 1, 4, ...",
        ),
        Misconception(
            "1 added to all",
            lambda conditioning, weight, bias: table_of(F.silu(conditioning), weight, bias, slice(None)),
            "you added 1 to everything. Only the scales get it: shift and gate are used as they are",
        ),
        Misconception(
            "1 added to the first scale",
            lambda conditioning, weight, bias: table_of(F.silu(conditioning), weight, bias, slice(1, 2)),
            "only the first scale got its 1. A double-stream block has two: one for attention, one for the MLP",
        ),
        Misconception(
            "first step everywhere",
            lambda conditioning, weight, bias: modulation_table(conditioning[:1].expand_as(conditioning), weight, bias),
            "every step has the signals of the first. They depend on the noise level, so each step has its own row",
        ),
        Misconception(
            "split the other way",
            split_the_other_way,
            "you split the outputs the other way round. The first dim numbers are the first signal, all channels of it",
        ),
    ),
)


# ---- when a step may be reused ------------------------------------------------------------------------------------------


def reused_steps(firsts: Sequence[Tensor], threshold: float) -> list[bool]:
    """Whether each step uses the last full step's change again, by what the first block added in each."""
    reused, last = [], None
    for first in firsts:
        again = last is not None and ((first - last).abs().mean() / last.abs().mean()).item() < threshold
        last = last if again else first
        reused.append(again)
    return reused


def walks() -> Iterator[dict[str, Any]]:
    """What a first block adds, drifting slowly: each step is near the one before, and soon far from the last full one."""
    generator = torch.Generator().manual_seed(7)
    for steps, size, drift, threshold, dtype in (
        (12, 3.0, 0.05, 0.12, torch.float32),
        (20, 0.02, 0.08, 0.2, torch.float64),
        (16, 40.0, 0.03, 0.1, torch.float64),
    ):
        start, way = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
        yield {"firsts": [(size * (start + step * drift * way)).to(dtype) for step in range(steps)], "threshold": threshold}


def compared_with(
    firsts: Sequence[Tensor], threshold: float, which: str = "full", relative: bool = True, signed: bool = False
) -> list[bool]:
    """As `reused_steps`, with the change taken to another step, absolute, or of means that have a sign."""
    reused, full = [], None
    for index, first in enumerate(firsts):
        last = {"full": full, "before": firsts[index - 1] if index else None, "first": firsts[0] if index else None}[which]
        if last is None:
            again = False
        else:
            change = (first - last).mean().abs() if signed else (first - last).abs().mean()
            again = (change / last.abs().mean() if relative else change).item() < threshold
        full = full if again else first
        reused.append(again)
    return reused


REUSED_STEPS = Exercise(
    name="reused_steps",
    reference=reused_steps,
    cases=walks,
    misconceptions=(
        Misconception(
            "the step before",
            lambda firsts, threshold: compared_with(firsts, threshold, which="before"),
            "you compared with the step before. Small changes add up unseen: compare with the last step that was computed in full",
        ),
        Misconception(
            "the first step",
            lambda firsts, threshold: compared_with(firsts, threshold, which="first"),
            "you compared with the first step for ever. After every full step, that one is the one to compare with",
        ),
        Misconception(
            "absolute change",
            lambda firsts, threshold: compared_with(firsts, threshold, relative=False),
            "your change is absolute. Divide by the mean size of what the first block added at the last full step",
        ),
        Misconception(
            "changes cancel",
            lambda firsts, threshold: compared_with(firsts, threshold, signed=True),
            "you averaged changes with their signs, so they cancel. Take the absolute value first, then the mean",
        ),
        Misconception(
            "the other way round",
            lambda firsts, threshold: [not again for again in reused_steps(firsts, threshold)],
            "your answer is the other way round: True means that the other blocks are left out",
        ),
    ),
)

EXERCISES = (PREDICTED_SECONDS, LINEAR_INTENSITY, FUSE_LINEARS, MODULATION_TABLE, REUSED_STEPS)
