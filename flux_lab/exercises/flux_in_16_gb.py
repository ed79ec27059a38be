"""The exercises of lesson 13."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception
from flux_lab.inference.int8 import LARGEST, quantize_rows
from flux_lab.inference.nf4 import BLOCK, NESTED_BLOCK, NF4_CODE

# ---- the peak of a plan -------------------------------------------------------------------------------------------------

Stages = dict[str, tuple[int, int]]


def staged_peak(stages: Stages) -> int:
    """The peak of stages that run one after the other, each freed before the next: name -> (weights, activations) in bytes."""
    return max(weights + activations for weights, activations in stages.values())


def plans() -> Iterator[dict[str, Stages]]:
    yield {"stages": {"encode": (9_770, 140), "denoise": (17_430, 390), "decode": (168, 2_150)}}
    yield {"stages": {"encode": (2_700, 140), "denoise": (2_400, 390), "decode": (168, 8_600)}}
    yield {"stages": {"encode": (900, 40), "denoise": (880, 390)}}


def weights_of(stages: Stages) -> list[int]:
    return [weights for weights, _ in stages.values()]


def activations_of(stages: Stages) -> list[int]:
    return [activations for _, activations in stages.values()]


STAGED_PEAK = Exercise(
    name="staged_peak",
    reference=staged_peak,
    cases=plans,
    misconceptions=(
        Misconception(
            "everything loaded",
            lambda stages: sum(weights_of(stages)) + max(activations_of(stages)),
            "you hold the weights of all stages at once. A staged pipeline frees one stage's weights before it loads the next",
        ),
        Misconception(
            "sum of all stages",
            lambda stages: sum(map(sum, stages.values())),
            "you added the stages up. They run one after the other, so the largest of them is the peak",
        ),
        Misconception(
            "weights only",
            lambda stages: max(weights_of(stages)),
            "you forgot the activations. In large pictures the decoder needs more for them than for its weights",
        ),
        Misconception(
            "largest of each",
            lambda stages: max(weights_of(stages)) + max(activations_of(stages)),
            "you added the largest weights and the largest activations. They may belong to different stages: add within a stage first",
        ),
    ),
)


# ---- what a matrix takes ------------------------------------------------------------------------------------------------


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def linear_bytes(rows: int, columns: int, scheme: str) -> int:
    """Bytes of a matrix of weights with its scales, in "bf16", "int8" or "nf4"."""
    if scheme == "nf4":
        blocks = ceil_div(rows * columns, BLOCK)
        return ceil_div(rows * columns, 2) + blocks + 4 * ceil_div(blocks, NESTED_BLOCK) + 4
    return {"bf16": 2 * rows * columns, "int8": rows * columns + 4 * rows}[scheme]


def matrices() -> Iterator[dict[str, Any]]:
    for rows, columns in ((96, 384), (3072, 768), (10, 64)):
        for scheme in ("bf16", "int8", "nf4"):
            yield {"rows": rows, "columns": columns, "scheme": scheme}


def for_int8(count: Callable[[int, int], int]) -> Callable[[int, int, str], int]:
    """An answer that is right but for int8."""
    return lambda rows, columns, scheme: count(rows, columns) if scheme == "int8" else linear_bytes(rows, columns, scheme)


def for_nf4(count: Callable[[int, int], int]) -> Callable[[int, int, str], int]:
    """An answer that is right but for NF4."""
    return lambda rows, columns, scheme: (
        count(rows * columns, ceil_div(rows * columns, BLOCK)) if scheme == "nf4" else linear_bytes(rows, columns, scheme)
    )


LINEAR_BYTES = Exercise(
    name="linear_bytes",
    reference=linear_bytes,
    cases=matrices,
    tolerance=0,
    misconceptions=(
        Misconception(
            "no scales",
            lambda rows, columns, scheme: rows * columns * {"bf16": 4, "int8": 2, "nf4": 1}[scheme] // 2,
            "you counted the weights alone. Without their scales they cannot be read: 4 bytes a row in int8, one byte a block in NF4",
        ),
        Misconception(
            "bits",
            lambda rows, columns, scheme: 8 * linear_bytes(rows, columns, scheme),
            "these are bits. A byte has eight of them",
        ),
        Misconception(
            "one scale for the matrix",
            for_int8(lambda rows, columns: rows * columns + 4),
            "you gave an int8 matrix one scale. Every row has its own",
        ),
        Misconception(
            "a scale for each column",
            for_int8(lambda rows, columns: rows * columns + 4 * columns),
            "you gave each column of an int8 matrix a scale. It is the rows that have one: a row makes one output channel",
        ),
        Misconception(
            "no double quantization",
            for_nf4(lambda count, blocks: count // 2 + 4 * blocks),
            "you stored the scale of each block in 4 bytes. Double quantization stores it in one byte, with 4 more for 256 of these",
        ),
        Misconception(
            "the offset forgotten",
            for_nf4(lambda count, blocks: count // 2 + blocks + 4 * ceil_div(blocks, NESTED_BLOCK)),
            "4 bytes are missing in NF4: the mean of all scales, which is taken off before they are rounded",
        ),
    ),
)


# ---- int8 ---------------------------------------------------------------------------------------------------------------

Rows = tuple[Tensor, Tensor]


def quantize_to_rows(matrix: Tensor) -> Rows:
    """int8 codes of the matrix's shape, and the largest absolute value of each row in fp32."""
    return quantize_rows(matrix)


def matrices_to_quantize() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(13)
    rows = torch.randn(5, 12, generator=generator) * torch.tensor([[1.0], [0.1], [3.0], [0.01], [0.5]])
    yield {"matrix": rows}
    yield {"matrix": torch.randn(8, 3, generator=generator).bfloat16()}
    yield {"matrix": torch.randn(4, 7, generator=generator) * torch.tensor([[1.0], [0.0], [1.0], [20.0]])}


def codes_by(matrix: Tensor, absmax: Tensor) -> Tensor:
    """Codes with a scale of any shape that fits. 0 / 0 is 0."""
    return (matrix.float() * LARGEST / absmax.clamp(min=1e-30)).round().to(torch.int8)


def whole_matrix(matrix: Tensor) -> Rows:
    absmax = matrix.float().abs().amax()
    return codes_by(matrix, absmax), absmax.expand(len(matrix)).clone()


def columns_of(matrix: Tensor) -> Rows:
    absmax = matrix.float().abs().amax(dim=0)
    return codes_by(matrix, absmax), absmax


def cut_off(matrix: Tensor) -> Rows:
    absmax = matrix.float().abs().amax(dim=1)
    return (matrix.float() * LARGEST / absmax[:, None].clamp(min=1e-30)).trunc().to(torch.int8), absmax


QUANTIZE_TO_ROWS = Exercise(
    name="quantize_to_rows",
    reference=quantize_to_rows,
    cases=matrices_to_quantize,
    misconceptions=(
        Misconception(
            "one scale for the matrix",
            whole_matrix,
            "you used one scale for the whole matrix. A row of small weights then gets few steps: take the maximum of each row",
        ),
        Misconception(
            "a scale for each column",
            columns_of,
            "you took the maximum of each column. A row holds the weights of one output channel: take it along dim=1",
        ),
        Misconception(
            "cut off",
            cut_off,
            "you cut the fraction off. Rounded to the nearest whole number the error is half as large: call `.round()`",
        ),
        Misconception(
            "steps in place of maxima",
            lambda matrix: (quantize_rows(matrix)[0], quantize_rows(matrix)[1] / LARGEST),
            "your second result is the size of one step, absmax / 127. The checkpoints hold absmax itself",
        ),
    ),
)


# ---- outliers -----------------------------------------------------------------------------------------------------------

Split = tuple[Tensor, Tensor, Tensor]


def split_outliers(x: Tensor, threshold: float) -> Split:
    """Outlier channels of the tokens, and codes and scales of the tokens without them."""
    return split_at(x, (x.abs().amax(dim=0) >= threshold).nonzero()[:, 0])


def split_at(x: Tensor, columns: Tensor) -> Split:
    return columns, *quantize_rows(x.index_fill(1, columns, 0.0))


def tokens_with_outliers() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(7, 16, generator=generator).clamp(-4, 4)
    x[:, 3] = 30 + 10 * torch.rand(7, generator=generator)
    x[2, 11] = -25.0  # one token, and negative
    yield {"x": x, "threshold": 6.0}
    y = torch.randn(20, 9, generator=generator).clamp(-2, 2)
    y[:, 1] = -9 - torch.rand(20, generator=generator)
    y[4, 6] = 8.0
    yield {"x": y, "threshold": 3.0}
    yield {"x": torch.randn(4, 5, generator=generator).clamp(-2, 2), "threshold": 6.0}


def tokens_split(x: Tensor, threshold: float) -> Split:
    tokens = (x.abs().amax(dim=1) >= threshold).nonzero()[:, 0]
    return tokens, *quantize_rows(x.index_fill(0, tokens, 0.0))


def scaled_before(x: Tensor, threshold: float) -> Split:
    columns, absmax = split_outliers(x, threshold)[0], x.abs().amax(dim=1)
    return columns, (x.index_fill(1, columns, 0.0) * LARGEST / absmax[:, None]).round().to(torch.int8), absmax


SPLIT_OUTLIERS = Exercise(
    name="split_outliers",
    reference=split_outliers,
    cases=tokens_with_outliers,
    misconceptions=(
        Misconception(
            "tokens in place of channels",
            tokens_split,
            "you took whole tokens out. An outlier is a channel: a column of x in which some token is large",
        ),
        Misconception(
            "negative ones overlooked",
            lambda x, threshold: split_at(x, (x.amax(dim=0) >= threshold).nonzero()[:, 0]),
            "you overlook channels with large negative numbers. Take the absolute value first",
        ),
        Misconception(
            "large in every token",
            lambda x, threshold: split_at(x, (x.abs().amin(dim=0) >= threshold).nonzero()[:, 0]),
            "you ask for channels in which every token is large. One is enough: its scale would be spoiled",
        ),
        Misconception(
            "scaled before the split",
            scaled_before,
            "your scales still know the outliers: the maximum was taken before they were removed. Set the columns to zero first",
        ),
        Misconception(
            "outliers left in",
            lambda x, threshold: (split_outliers(x, threshold)[0], *quantize_rows(x)),
            "you found the outlier columns but left them in the tokens. They would be multiplied twice, and spoil the scales",
        ),
    ),
)


# ---- NF4 ----------------------------------------------------------------------------------------------------------------


def unpack_nf4(packed: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """Weights in fp32 from bytes of two 4-bit indices, the upper half first; `absmax` has a scale for each block of 64 weights."""
    return scaled(interleaved(packed >> 4, packed & 15), absmax, code)


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    return rearrange([first, second], "half bytes -> (bytes half)")


def scaled(indices: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    return code[indices.int()] * absmax.repeat_interleave(BLOCK)


def packed_weights() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    for blocks in (1, 4, 6):
        packed = torch.randint(0, 256, (blocks * BLOCK // 2,), generator=generator, dtype=torch.uint8)
        yield {"packed": packed, "absmax": torch.rand(blocks, generator=generator) + 0.1, "code": torch.tensor(NF4_CODE)}


def scale_for_64_bytes(packed: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    return code[interleaved(packed >> 4, packed & 15).int()] * absmax.repeat_interleave(2 * BLOCK)[: 2 * len(packed)]


UNPACK_NF4 = Exercise(
    name="unpack_nf4",
    reference=unpack_nf4,
    cases=packed_weights,
    misconceptions=(
        Misconception(
            "lower half first",
            lambda packed, absmax, code: scaled(interleaved(packed & 15, packed >> 4), absmax, code),
            "you swapped the halves of each byte. The first of the two weights lies in the upper half",
        ),
        Misconception(
            "halves one after the other",
            lambda packed, absmax, code: scaled(torch.cat([packed >> 4, packed & 15]), absmax, code),
            "you put all upper halves in front of all lower ones. The two weights of one byte are neighbours",
        ),
        Misconception(
            "even levels",
            lambda packed, absmax, code: scaled(interleaved(packed >> 4, packed & 15), absmax, torch.linspace(-1, 1, 16)),
            "you spaced the 16 levels evenly. NF4 looks each index up in its code book",
        ),
        Misconception(
            "a scale for 64 bytes",
            scale_for_64_bytes,
            "your scales reach over 64 bytes. A block is 64 weights, which are 32 bytes",
        ),
    ),
)

EXERCISES = (STAGED_PEAK, LINEAR_BYTES, QUANTIZE_TO_ROWS, SPLIT_OUTLIERS, UNPACK_NF4)
