"""The exercises of lesson 07."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception

DTYPES = (torch.float32, torch.float64, torch.float16)


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- attention and MLP side by side -------------------------------------------------------------------------------------


def parallel_update(sequence: Tensor, attention: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """sequence, attention [batch, sequence, dim], mlp [batch, sequence, hidden] behind GELU, weight [dim, dim + hidden]."""
    return sequence + gate[:, None] * F.linear(torch.cat([attention, mlp], dim=2), weight, bias)


def blocks() -> Iterator[dict[str, Tensor]]:
    for (batch, count, dim, hidden), dtype in zip(((1, 4, 6, 6), (2, 5, 4, 16), (3, 2, 8, 12)), DTYPES, strict=True):
        yield {
            "sequence": drawn(dtype, batch, count, dim, seed=0),
            "attention": drawn(dtype, batch, count, dim, seed=1),
            "mlp": drawn(dtype, batch, count, hidden, seed=2),
            "weight": drawn(dtype, dim, dim + hidden, seed=3),
            "bias": drawn(dtype, dim, seed=4),
            "gate": drawn(dtype, batch, dim, seed=5),
        }


def projected(attention: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(torch.cat([attention, mlp], dim=2), weight, bias)


PARALLEL_UPDATE = Exercise(
    name="parallel_update",
    reference=parallel_update,
    cases=blocks,
    # In float16 the order of the sums shows.
    tolerance=2e-2,
    misconceptions=(
        Misconception(
            "MLP first",
            lambda sequence, attention, mlp, weight, bias, gate: (
                sequence + gate[:, None] * F.linear(torch.cat([mlp, attention], dim=2), weight, bias)
            ),
            "you put the MLP in front. The first columns of the weight belong to attention",
        ),
        Misconception(
            "no residual",
            lambda sequence, attention, mlp, weight, bias, gate: gate[:, None] * projected(attention, mlp, weight, bias),
            "the sequence itself is missing: the gated update is added to it",
        ),
        Misconception(
            "gate on the stream",
            lambda sequence, attention, mlp, weight, bias, gate: gate[:, None] * (sequence + projected(attention, mlp, weight, bias)),
            "the gate multiplies the sequence too. Only the update is gated",
        ),
        Misconception(
            "gate on attention",
            lambda sequence, attention, mlp, weight, bias, gate: sequence + projected(gate[:, None] * attention, mlp, weight, bias),
            "you gate what attention gives before the projection. There is one gate, behind the projection, for both",
        ),
        Misconception(
            "bias not gated",
            lambda sequence, attention, mlp, weight, bias, gate: sequence + gate[:, None] * projected(attention, mlp, weight, None) + bias,
            "the bias escapes the gate. A gate of zero must close the block altogether",
        ),
        Misconception(
            "bias twice",
            lambda sequence, attention, mlp, weight, bias, gate: (
                sequence + gate[:, None] * (projected(attention, mlp, weight, bias) + bias)
            ),
            "the bias is added twice. Two projections with a bias each are not one projection of both",
        ),
        Misconception(
            "GELU again",
            lambda sequence, attention, mlp, weight, bias, gate: (
                sequence + gate[:, None] * projected(attention, F.gelu(mlp, approximate="tanh"), weight, bias)
            ),
            "you apply GELU once more. The argument `mlp` has been through it already",
        ),
    ),
)


# ---- how far a block turns its tokens -----------------------------------------------------------------------------------


def direction_change(before: Tensor, after: Tensor) -> Tensor:
    """The angle in degrees between each token [batch, tokens, dim] before and after, averaged over all tokens: a tensor without axes."""
    return angle(F.cosine_similarity(before, after, dim=2)).mean()


def angle(cosine: Tensor) -> Tensor:
    return cosine.clamp(-1, 1).acos().rad2deg()


def walks() -> Iterator[dict[str, Tensor]]:
    for (batch, tokens, dim), dtype in zip(((1, 4, 6), (2, 5, 8), (1, 7, 3)), (torch.float32, torch.float64, torch.float32), strict=True):
        before, change = drawn(dtype, batch, tokens, dim), drawn(dtype, batch, tokens, dim, seed=1)
        # Tokens of different lengths, so that what is averaged matters.
        lengths = torch.linspace(0.5, 4, tokens, dtype=dtype)[:, None]
        yield {"before": before * lengths, "after": (before + change) * lengths.flip(0)}


DIRECTION_CHANGE = Exercise(
    name="direction_change",
    reference=direction_change,
    cases=walks,
    tolerance=1e-3,
    misconceptions=(
        Misconception(
            "radians",
            lambda before, after: angle(F.cosine_similarity(before, after, dim=2)).deg2rad().mean(),
            "this is in radians. 180 degrees are pi radians",
        ),
        Misconception(
            "the cosine",
            lambda before, after: F.cosine_similarity(before, after, dim=2).mean(),
            "this is the cosine, 1 for no change. The angle is its arccosine",
        ),
        Misconception(
            "cosines averaged",
            lambda before, after: angle(F.cosine_similarity(before, after, dim=2).mean()),
            "you average the cosines and take the angle last. Take the angle of each token, then average",
        ),
        Misconception(
            "one long vector",
            lambda before, after: angle(F.cosine_similarity(before.flatten(), after.flatten(), dim=0)),
            "you treat all tokens as one long vector, so long tokens count more. Each token has an angle of its own",
        ),
        Misconception(
            "tokens averaged",
            lambda before, after: angle(F.cosine_similarity(before.mean(dim=1), after.mean(dim=1), dim=1)).mean(),
            "you average the tokens first. Each token has an angle of its own; average the angles",
        ),
        Misconception(
            "angle of the update",
            lambda before, after: angle(F.cosine_similarity(before, after - before, dim=2)).mean(),
            "this is the angle between the stream and what was added to it. Asked is the angle between before and after",
        ),
        Misconception(
            "channel by channel",
            lambda before, after: angle(F.cosine_similarity(before, after, dim=1)).mean(),
            "you compare channels over the tokens. A token's vector runs along the last axis",
        ),
    ),
)


# ---- how much the picture still reads the text --------------------------------------------------------------------------


def text_share(probabilities: Tensor, length: int) -> Tensor:
    """The share of their attention that image tokens give to all text tokens, from [heads, sequence, sequence]: a tensor without axes."""
    return probabilities[:, length:, :length].sum(dim=2).mean()


def matrices() -> Iterator[dict[str, Any]]:
    for (heads, sequence, length), dtype in zip(
        ((3, 9, 4), (2, 12, 3), (1, 6, 4)), (torch.float32, torch.float64, torch.float32), strict=True
    ):
        yield {"probabilities": (2 * drawn(dtype, heads, sequence, sequence)).softmax(dim=-1), "length": length}


TEXT_SHARE = Exercise(
    name="text_share",
    reference=text_share,
    cases=matrices,
    misconceptions=(
        Misconception(
            "the text asks",
            lambda probabilities, length: probabilities[:, :length, length:].sum(dim=2).mean(),
            "this is how much the text reads the picture. Rows ask: take the image's rows and the text's columns",
        ),
        Misconception(
            "everyone asks",
            lambda probabilities, length: probabilities[:, :, :length].sum(dim=2).mean(),
            "you average over all queries, those of the text too. Asked are the image's only",
        ),
        Misconception(
            "mean over the keys",
            lambda probabilities, length: probabilities[:, length:, :length].mean(),
            "you average over the text tokens. A share is a sum over the keys; only queries and heads are averaged",
        ),
        Misconception(
            "the picture's own share",
            lambda probabilities, length: probabilities[:, length:, length:].sum(dim=2).mean(),
            "this is what the picture gives to itself: the rest of the share that is asked for",
        ),
        Misconception(
            "sum over the queries",
            lambda probabilities, length: probabilities[:, length:, :length].sum(dim=1).mean(),
            "you sum over the queries. Rows sum to 1, columns do not: sum over the last axis",
        ),
        Misconception(
            "everything summed",
            lambda probabilities, length: probabilities[:, length:, :length].sum(),
            "you sum over queries and heads too. Average over them, so that the result lies between 0 and 1",
        ),
    ),
)

EXERCISES = (PARALLEL_UPDATE, DIRECTION_CHANGE, TEXT_SHARE)
