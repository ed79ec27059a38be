"""The exercises of lesson 08."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception

DoubleBlock = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
SingleBlock = Callable[[Tensor], Tensor]


# ---- parameters of a block ----------------------------------------------------------------------------------------------


def linear(d_in: int, d_out: int) -> int:
    """Parameters of a linear layer: weight and bias."""
    return d_in * d_out + d_out


def double_block_parameters(dim: int, head_dim: int, streams: int = 2, signals: int = 6, hidden: int = 4) -> int:
    """Parameters of a double-stream block of width `dim`: modulation, attention with its QK norms, and MLP of both streams."""
    modulation = linear(dim, signals * dim)
    attention = 4 * linear(dim, dim) + 2 * head_dim
    mlp = linear(dim, hidden * dim) + linear(hidden * dim, dim)
    return streams * (modulation + attention + mlp)


def widths() -> Iterator[dict[str, int]]:
    for dim, head_dim in ((96, 32), (3072, 128), (20, 10), (512, 64)):
        yield {"dim": dim, "head_dim": head_dim}


DOUBLE_BLOCK_PARAMETERS = Exercise(
    name="double_block_parameters",
    reference=double_block_parameters,
    cases=widths,
    misconceptions=(
        Misconception(
            "one stream",
            lambda dim, head_dim: double_block_parameters(dim, head_dim, streams=1),
            "you counted one stream. Text and image have weights of their own, of the same sizes",
        ),
        Misconception(
            "no biases",
            lambda dim, head_dim: 36 * dim**2 + 4 * head_dim,
            "you left out the biases. Every linear layer has one number for each of its outputs",
        ),
        Misconception(
            "three signals",
            lambda dim, head_dim: double_block_parameters(dim, head_dim, signals=3),
            "you gave the modulation three signals a stream. It has six: shift, scale and gate for attention, and again for the MLP",
        ),
        Misconception(
            "no query and key norms",
            lambda dim, head_dim: double_block_parameters(dim, 0),
            "the norms of queries and keys are missing. Each has head_dim weights, and each stream has its own two",
        ),
        Misconception(
            "layer norms with weights",
            lambda dim, head_dim: double_block_parameters(dim, head_dim) + 8 * dim,
            "you gave the four layer norms a weight and a bias. They have none: scale and shift come from the modulation",
        ),
        Misconception(
            "narrow MLP",
            lambda dim, head_dim: double_block_parameters(dim, head_dim, hidden=1),
            "your MLP is as wide as the model. Inside it is four times as wide",
        ),
    ),
)


# ---- the attention product ----------------------------------------------------------------------------------------------


def attention_product_flops(tokens: int, length: int, dim: int) -> int:
    """FLOPs of q k and of probabilities x values, in one block, all heads together."""
    return 4 * (tokens + length) ** 2 * dim


def passes() -> Iterator[dict[str, int]]:
    for tokens, length, dim in ((64, 32, 96), (4096, 512, 3072), (1024, 256, 3072), (7, 5, 12)):
        yield {"tokens": tokens, "length": length, "dim": dim}


ATTENTION_PRODUCT_FLOPS = Exercise(
    name="attention_product_flops",
    reference=attention_product_flops,
    cases=passes,
    misconceptions=(
        Misconception(
            "half of it",
            lambda tokens, length, dim: 2 * (tokens + length) ** 2 * dim,
            "that is half. Two products are taken, scores and weighted values, and in each a multiplication and an addition count as two",
        ),
        Misconception(
            "image only",
            lambda tokens, length, dim: 4 * tokens**2 * dim,
            "you left out the text. Text and image are one sequence in attention",
        ),
        Misconception(
            "two separate attentions",
            lambda tokens, length, dim: 4 * (tokens**2 + length**2) * dim,
            "you let text and image attend to themselves only. In joint attention every token attends to all tokens of both",
        ),
        Misconception(
            "text as keys only",
            lambda tokens, length, dim: 4 * tokens * (tokens + length) * dim,
            "you let only the image ask, as cross attention does. In joint attention the text tokens are queries too",
        ),
        Misconception(
            "grows with the width squared",
            lambda tokens, length, dim: 4 * (tokens + length) * dim**2,
            "you squared the width. That is how the linear layers grow; the attention product grows with the square of the sequence",
        ),
        Misconception(
            "with the linear layers",
            lambda tokens, length, dim: 4 * (tokens + length) ** 2 * dim + 8 * (tokens + length) * dim**2,
            "you added the four linear layers of attention. Only the two products between tokens are asked for",
        ),
    ),
)


# ---- the order of the pass ----------------------------------------------------------------------------------------------


def run_blocks(text: Tensor, image: Tensor, double: Sequence[DoubleBlock], single: Sequence[SingleBlock]) -> Tensor:
    """The image stream behind the last block."""
    for block in double:
        text, image = block(text, image)
    sequence = torch.cat([text, image], dim=1)
    for block in single:
        sequence = block(sequence)
    return sequence[:, text.shape[1] :]


def mixing(strength: float) -> DoubleBlock:
    """Stands for a double-stream block: each stream moves by the other's mean, by different amounts."""
    return lambda text, image: (
        0.9 * text + strength * image.mean(dim=1, keepdim=True),
        1.1 * image - strength * text.mean(dim=1, keepdim=True),
    )


def running(strength: float) -> SingleBlock:
    """Stands for a single-stream block: every token depends on its place and on all others."""
    return lambda sequence: sequence + strength * (sequence.cumsum(dim=1) - sequence.mean(dim=1, keepdim=True))


def streams() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(8)
    for batch, length, tokens, dim, dtype in ((1, 3, 8, 4, torch.float32), (2, 5, 4, 6, torch.float64), (3, 6, 6, 2, torch.float64)):
        text, image = (torch.randn(batch, count, dim, generator=generator, dtype=torch.float64).to(dtype) for count in (length, tokens))
        double, single = [mixing(strength) for strength in (0.3, 0.5)], [running(strength) for strength in (0.1, 0.2, 0.4)]
        yield {"text": text, "image": image, "double": double, "single": single}


def joined(text: Tensor, image: Tensor, double: Sequence[DoubleBlock], single: Sequence[SingleBlock]) -> Tensor:
    """The whole sequence behind the last block, text first."""
    for block in double:
        text, image = block(text, image)
    sequence = torch.cat([text, image], dim=1)
    for block in single:
        sequence = block(sequence)
    return sequence


def image_first(text: Tensor, image: Tensor, double: Sequence[DoubleBlock], single: Sequence[SingleBlock]) -> Tensor:
    for block in double:
        text, image = block(text, image)
    return joined(image, text, [], single)[:, : image.shape[1]]


def swapped_results(text: Tensor, image: Tensor, double: Sequence[DoubleBlock], single: Sequence[SingleBlock]) -> Tensor:
    for block in double:
        image, text = block(text, image)
    return joined(text, image, [], single)[:, text.shape[1] :]


def without_text(text: Tensor, image: Tensor, double: Sequence[DoubleBlock], single: Sequence[SingleBlock]) -> Tensor:
    for block in double:
        text, image = block(text, image)
    return joined(image[:, :0], image, [], single)


RUN_BLOCKS = Exercise(
    name="run_blocks",
    reference=run_blocks,
    cases=streams,
    misconceptions=(
        Misconception("text kept", joined, "you returned the whole sequence. The text has done its work: only the image tokens go on"),
        Misconception(
            "wrong end",
            lambda text, image, double, single: joined(text, image, double, single)[:, : image.shape[1]],
            "you cut from the wrong end. Text comes first, so the image tokens begin after the text's length",
        ),
        Misconception("image first", image_first, "you put the image in front. In every concatenation of FLUX the text comes first"),
        Misconception(
            "text not joined",
            without_text,
            "the single-stream blocks got the image alone. They work on text and image as one sequence",
        ),
        Misconception(
            "results swapped",
            swapped_results,
            "you swapped what a double-stream block returns: (text, image), in this order",
        ),
        Misconception(
            "single blocks skipped",
            lambda text, image, double, single: run_blocks(text, image, double, []),
            "the single-stream blocks did not run",
        ),
    ),
)

EXERCISES = (DOUBLE_BLOCK_PARAMETERS, ATTENTION_PRODUCT_FLOPS, RUN_BLOCKS)
