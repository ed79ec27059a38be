"""The exercises of lesson 06."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception
from flux_lab.normalization import EPS

DTYPES = (torch.float32, torch.float64, torch.float16)


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- the norm of queries and keys ---------------------------------------------------------------------------------------


def head_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [batch, sequence, heads, head_dim], weight [head_dim]: every head of every token to a root mean square of 1, then weighted."""
    return rms(x, dim=(3,)) * weight


def rms(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=dim, keepdim=True) + EPS)


def split_queries() -> Iterator[dict[str, Tensor]]:
    for (batch, sequence, heads, head_dim), dtype in zip(((1, 4, 3, 6), (2, 5, 2, 8), (3, 2, 4, 10)), DTYPES, strict=True):
        yield {
            "x": 2 * drawn(dtype, batch, sequence, heads, head_dim) + 0.5,
            "weight": 1 + 0.5 * drawn(dtype, head_dim, seed=1),
        }


HEAD_RMS_NORM = Exercise(
    name="head_rms_norm",
    reference=head_rms_norm,
    cases=split_queries,
    tolerance=1e-2,
    misconceptions=(
        Misconception(
            "all heads together",
            lambda x, weight: rms(x, dim=(2, 3)) * weight,
            "you average over all heads of a token. Each head is normalised by itself, over its head_dim numbers",
        ),
        Misconception(
            "over the tokens",
            lambda x, weight: rms(x, dim=(1,)) * weight,
            "you average over the tokens of the sequence. Each token is normalised by itself, over the last axis",
        ),
        Misconception(
            "mean removed",
            lambda x, weight: F.layer_norm(x, x.shape[-1:], eps=EPS) * weight,
            "you took the mean off: that is a layer norm. An RMS norm only divides",
        ),
        Misconception(
            "sum in place of the mean",
            lambda x, weight: F.normalize(x, dim=3) * weight,
            "you divide by the length, the root of the sum of squares. It is the root of their mean, so the length becomes sqrt(head_dim)",
        ),
        Misconception(
            "no root",
            lambda x, weight: x / (x.square().mean(dim=3, keepdim=True) + EPS) * weight,
            "you divide by the mean square. Divide by its root",
        ),
        Misconception("no weight", lambda x, weight: rms(x, dim=(3,)), "the learned weight is missing: multiply by it at the end"),
        Misconception(
            "1 + weight",
            lambda x, weight: rms(x, dim=(3,)) * (1 + weight),
            "you multiply by 1 + weight. That form belongs to the scale of AdaLN; this weight starts at 1 and is used as it is",
        ),
    ),
)


# ---- joint attention ----------------------------------------------------------------------------------------------------


def joint_attention(query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of [batch, sequence, heads, head_dim], the first `length` tokens text; returns (text, image), the heads merged."""
    output = merged(probabilities(query, key), value)
    return output[:, :length], output[:, length:]


def probabilities(query: Tensor, key: Tensor, divisor: float | None = None, over: int = -1) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / (query.shape[3] ** 0.5 if divisor is None else divisor)
    return scores.softmax(dim=over)


def merged(weights: Tensor, value: Tensor, pattern: str = "(heads head_dim)") -> Tensor:
    output = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    return rearrange(output, f"batch sequence heads head_dim -> batch sequence {pattern}")


def cut(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return x[:, :length], x[:, length:]


def separate(query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, ...]:
    streams = zip(*(cut(each, length) for each in (query, key, value)), strict=True)
    return tuple(merged(probabilities(q, k), v) for q, k, v in streams)


def cross(query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
    (text_q, image_q), (text_k, image_k), (text_v, image_v) = (cut(each, length) for each in (query, key, value))
    return merged(probabilities(text_q, image_k), image_v), merged(probabilities(image_q, text_k), text_v)


def heads() -> Iterator[dict[str, Any]]:
    shapes = (((1, 7, 3, 4), 3), ((2, 6, 2, 8), 2), ((1, 9, 4, 6), 5))
    for (shape, length), dtype in zip(shapes, DTYPES, strict=True):
        query, key, value = (drawn(dtype, *shape, seed=seed) for seed in range(3))
        yield {"query": query, "key": key, "value": value, "length": length}


JOINT_ATTENTION = Exercise(
    name="joint_attention",
    reference=joint_attention,
    cases=heads,
    tolerance=1e-2,
    misconceptions=(
        Misconception(
            "each stream alone",
            separate,
            "text looks at text and image at image only. Joint attention is one softmax over the whole sequence",
        ),
        Misconception(
            "cross attention",
            cross,
            "each stream looks at the other only. In joint attention every token looks at all tokens, its own stream included",
        ),
        Misconception(
            "no scale",
            lambda query, key, value, length: cut(merged(probabilities(query, key, divisor=1.0), value), length),
            "the scores are not divided by sqrt(head_dim)",
        ),
        Misconception(
            "divided by head_dim",
            lambda query, key, value, length: cut(merged(probabilities(query, key, divisor=query.shape[3]), value), length),
            "you divide by head_dim. It is its square root",
        ),
        Misconception(
            "root of the whole width",
            lambda query, key, value, length: cut(
                merged(probabilities(query, key, divisor=(query.shape[2] * query.shape[3]) ** 0.5), value), length
            ),
            "you divide by the square root of heads * head_dim. Each head works by itself: it is sqrt(head_dim)",
        ),
        Misconception(
            "softmax over the queries",
            lambda query, key, value, length: cut(merged(probabilities(query, key, over=-2), value), length),
            "your softmax runs over the queries. A query divides its attention among the keys: the last axis of the scores",
        ),
        Misconception(
            "heads interleaved",
            lambda query, key, value, length: cut(merged(probabilities(query, key), value, "(head_dim heads)"), length),
            "the heads are interleaved in the output. They stand one behind the other: (heads head_dim)",
        ),
        Misconception(
            "image first",
            lambda query, key, value, length: joint_attention(query, key, value, length)[::-1],
            "you return (image, text). The text is asked for first",
        ),
    ),
)


# ---- from a word to the picture -----------------------------------------------------------------------------------------


def word_to_picture(probabilities: Tensor, token: int, length: int, rows: int, columns: int) -> Tensor:
    """What the image tokens give to text token `token`, [rows, columns], from [heads, sequence, sequence]: the mean over heads."""
    return rearrange(column_of(probabilities, token, length).mean(dim=0), "(rows columns) -> rows columns", rows=rows)


def matrices() -> Iterator[dict[str, Any]]:
    for count, length, rows, columns, token in ((3, 4, 2, 3, 1), (2, 9, 2, 4, 6), (4, 5, 3, 2, 0)):
        sequence = length + rows * columns
        weights = (2 * drawn(torch.float32, count, sequence, sequence)).softmax(dim=-1)
        yield {"probabilities": weights, "token": token, "length": length, "rows": rows, "columns": columns}


def asked_by(probabilities: Tensor, token: int, length: int, rows: int, columns: int) -> Tensor:
    return probabilities[:, token, length:].mean(dim=0).reshape(rows, columns)


def column_of(probabilities: Tensor, token: int, length: int) -> Tensor:
    return probabilities[:, length:, token]


WORD_TO_PICTURE = Exercise(
    name="word_to_picture",
    reference=word_to_picture,
    cases=matrices,
    misconceptions=(
        Misconception(
            "the word asks",
            asked_by,
            "you took the row of the word: what the word looks at. Who looks at the word is its column",
        ),
        Misconception(
            "text not skipped",
            lambda probabilities, token, length, rows, columns: (
                probabilities[:, : rows * columns, token].mean(dim=0).reshape(rows, columns)
            ),
            "you took the first queries of the sequence. Those are text: the image begins at `length`",
        ),
        Misconception(
            "an image token as the word",
            lambda probabilities, token, length, rows, columns: (
                probabilities[:, length:, length + token].mean(dim=0).reshape(rows, columns)
            ),
            "you added `length` to the word's place. Text comes first, so the word is key number `token`",
        ),
        Misconception(
            "columns first",
            lambda probabilities, token, length, rows, columns: (
                column_of(probabilities, token, length).mean(dim=0).reshape(columns, rows).T
            ),
            "rows and columns are exchanged. Image tokens run along a row first",
        ),
        Misconception(
            "heads added",
            lambda probabilities, token, length, rows, columns: column_of(probabilities, token, length).sum(dim=0).reshape(rows, columns),
            "you added the heads up. Take their mean, so that the result is a share",
        ),
        Misconception(
            "first head only",
            lambda probabilities, token, length, rows, columns: column_of(probabilities, token, length)[0].reshape(rows, columns),
            "this is the first head alone. Average over all heads",
        ),
    ),
)

EXERCISES = (HEAD_RMS_NORM, JOINT_ATTENTION, WORD_TO_PICTURE)
