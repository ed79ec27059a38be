"""NF4: 4 bits for every weight, one of 16 levels that are dense where a bell curve has many numbers.

Two ideas. Trained weights are close to normally distributed, so the levels are quantiles of the normal distribution. And the scale is
taken for every 64 weights, not for a whole row, so that one large weight spoils few others. Those scales would cost half a bit a weight;
double quantization stores them in 8 bits as well, by the same function with another code book, and they cost an eighth of a bit.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.
"""

import functools
import statistics
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from flux_lab.inference.quantized_linear import QuantizedLinear
from flux_lab.shapes import shaped

# Weights to a scale, and scales to a scale of scales.
BLOCK, NESTED_BLOCK = 64, 256
# Blocks that the CPU turns back at a time.
PIECE = 2**13
SMALLEST = 1e-38
# As published (QLoRA, appendix E); `normal_float_code` computes them, the last digit aside.
NF4_CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def normal_float_code() -> Float[Tensor, "16"]:
    """The 16 levels: quantiles of the normal distribution, 7 below zero, 8 above it, and zero itself, scaled to -1 ... 1.

    At a probability of 0 or 1 the quantile is infinite. So the outermost level keeps away from there by half of what one level gets: 1/30
    when 15 levels share the probability, 1/32 when 16 do, and the mean of the two is taken.
    """
    quantile = statistics.NormalDist().inv_cdf
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = [quantile(outermost + (0.5 - outermost) * step / 8) for step in range(8)]
    below = [-quantile(outermost + (0.5 - outermost) * step / 7) for step in range(7)]
    return torch.tensor([level / above[0] for level in sorted([*below, 0.0, *above])])


def dynamic_code() -> Float[Tensor, "256"]:
    """The 8-bit code book of the scales: 0, 1, and for each of seven powers of ten twice as many levels as for the next smaller one.

    Source: Dettmers 2015, arXiv 1511.04561, section 2.
    """
    edges = [torch.linspace(0.1, 1, 2**power + 1, device="cpu") for power in range(7)]
    positive = torch.cat([10.0 ** (power - 6) * ((edge[:-1] + edge[1:]) / 2) for power, edge in enumerate(edges)])
    return torch.cat([-positive, torch.tensor([0.0, 1.0], device="cpu"), positive]).sort().values


@functools.cache
def code_books(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """On a device: the levels of weights, all 256 pairs of levels that a byte can hold, the levels of scales."""
    levels = torch.tensor(NF4_CODE, device=device)
    pairs = torch.stack([levels.repeat_interleave(len(levels)), levels.repeat(len(levels))], dim=1)
    return levels, pairs, dynamic_code().to(device)


# ------------------------------------------------------------------------------------------------- blocks, with any code book


@shaped
@torch.no_grad()
def quantize_blocks(
    numbers: Float[Tensor, "count"], code: Float[Tensor, "levels"], block: int
) -> tuple[UInt8[Tensor, "count"], Float[Tensor, "blocks"]]:
    """For each number the index of the nearest level, and the largest absolute value of each block in fp32. The last may be short."""
    blocks = rearrange(_fill_up(numbers.float(), block), "(blocks block) -> blocks block", block=block)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]
    # The nearest level is the number of midpoints between levels that lie below.
    nearest = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
    # Cut before the cast: what is kept holds nothing of what was filled up.
    return rearrange(nearest, "blocks block -> (blocks block)")[: len(numbers)].to(torch.uint8), absmax


@shaped
def dequantize_blocks(
    indices: UInt8[Tensor, "indices"], absmax: Float[Tensor, "blocks"], code: Float[Tensor, "levels *each"], block: int
) -> Float[Tensor, "numbers"]:
    """The numbers that the indices stand for, in fp32: one for each index, or two when an entry of `code` is a pair."""
    return _look_up(indices, absmax, code, block)


def _look_up(indices: Tensor, absmax: Tensor, code: Tensor, block: int) -> Tensor:
    # A pair of fp32 numbers is looked up as one number of 64 bits: thirty times as fast.
    entries = code if code.ndim == 1 else code.view(torch.int64).flatten()
    numbers = entries.index_select(0, indices.int()).view(torch.float32)
    blocks = rearrange(_fill_up(numbers, block), "(blocks block) -> blocks block", block=block).mul_(absmax[:, None])
    return rearrange(blocks, "blocks block -> (blocks block)")[: len(numbers)]


def _fill_up(numbers: Tensor, block: int) -> Tensor:
    missing = -len(numbers) % block
    return F.pad(numbers, (0, missing)) if missing else numbers


# --------------------------------------------------------------------------------------------------------------------------- NF4


class NF4(NamedTuple):
    """A matrix in NF4. The scale of a block is `offset` plus what `absmax` stands for."""

    weight: UInt8[Tensor, "bytes"]  # two weights a byte, the first in its upper half
    absmax: UInt8[Tensor, "blocks"]  # indices into `dynamic_code`
    nested_absmax: Float[Tensor, "nested_blocks"]
    offset: Float[Tensor, ""]


@torch.no_grad()
def quantize_nf4(matrix: Float[Tensor, "rows channels"]) -> NF4:
    """Blocks run along the rows, and over their ends."""
    levels, _, scale_levels = code_books(matrix.device)
    indices, absmax = quantize_blocks(matrix.flatten(), levels, BLOCK)
    pairs = rearrange(_fill_up(indices, 2), "(bytes pair) -> pair bytes", pair=2)
    # All scales are positive: around their mean they use both halves of the code book.
    offset = absmax.mean()
    return NF4(pairs[0] << 4 | pairs[1], *quantize_blocks(absmax - offset, scale_levels, NESTED_BLOCK), offset)


def dequantize_nf4(quantized: NF4, rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows channels"]:
    """The weights that the bytes stand for, computed in fp32. A code book of pairs reads both halves of a byte at once."""
    _, pairs, scale_levels = code_books(quantized.weight.device)
    absmax = dequantize_blocks(quantized.absmax, quantized.nested_absmax, scale_levels, NESTED_BLOCK) + quantized.offset
    weights = torch.empty(rows * channels, dtype=dtype, device=quantized.weight.device)
    # Piece by piece on the CPU: what lies between bytes and weights is larger than both, and stays in its cache that way.
    piece = PIECE if weights.is_cpu else len(absmax)
    for first in range(0, len(absmax), piece):
        start, stop = first * BLOCK, (first + piece) * BLOCK
        numbers = _look_up(quantized.weight[start // 2 : stop // 2], absmax[first : first + piece], pairs, BLOCK)
        weights[start:stop] = numbers[: len(weights) - start]
    return rearrange(weights, "(rows channels) -> rows channels", rows=rows)


class LinearNF4(QuantizedLinear):
    """A linear layer with NF4 weights. Weight-only: there is no product of 4-bit numbers, the weights are turned back first."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        count = in_features * out_features
        blocks = -(-count // BLOCK)
        self.register_buffer("weight", torch.zeros(-(-count // 2), dtype=torch.uint8))
        self.register_buffer("absmax", torch.zeros(blocks, dtype=torch.uint8))
        self.register_buffer("nested_absmax", torch.zeros(-(-blocks // NESTED_BLOCK)))
        self.register_buffer("offset", torch.zeros(()))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The same layer, its weights rounded. The bias is taken as it is."""
        quantized = cls._like(linear)
        for name, tensor in quantize_nf4(linear.weight)._asdict().items():
            setattr(quantized, name, tensor)
        return quantized

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out_channels channels"]:
        """The weights that the layer multiplies with."""
        quantized = NF4(self.weight, self.absmax, self.nested_absmax, self.offset)
        return dequantize_nf4(quantized, self.out_features, self.in_features, dtype)

    @shaped
    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch out_channels"]:
        return F.linear(x, self.dequantized(x.dtype), self.bias)
