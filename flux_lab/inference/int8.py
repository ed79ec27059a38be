"""8 bits: a whole number from -127 to 127 for every weight, and one scale for each row of the matrix.

A linear layer multiplies such a matrix in one of two ways. Weight only: turn it back into floating point, then multiply as always.
LLM.int8(): give the tokens whole numbers and scales of their own, multiply whole numbers with whole numbers, and scale the result. A few
channels of the tokens are much larger than all others; they would use up the 255 steps of their token, so these columns are multiplied
in floating point. Source: Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, sections 2 and 3.
"""

from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Int8, Int64
from torch import Tensor, nn

from flux_lab.inference.quantized_linear import QuantizedLinear
from flux_lab.shapes import shaped

LARGEST = 127
# A channel is an outlier when one token has a number at least this large in it. Found by the paper to hold for all its models.
THRESHOLD = 6.0
# Integer products of CUDA: sizes in steps of 8, and more rows than 16.
CUDA_STEP, CUDA_ROWS = 8, 32


@shaped
@torch.no_grad()
def quantize_rows(matrix: Float[Tensor, "rows channels"]) -> tuple[Int8[Tensor, "rows channels"], Float[Tensor, "rows"]]:
    """Whole numbers, and the largest absolute value of each row in fp32: 127 stands for it. A row of zeros stays one."""
    absmax = matrix.abs().amax(dim=1).float()
    scale = LARGEST / absmax.masked_fill(absmax == 0, 1.0)
    return (matrix * scale[:, None]).round_().to(torch.int8), absmax


@shaped
def dequantize_rows(codes: Int8[Tensor, "rows channels"], absmax: Float[Tensor, "rows"]) -> Float[Tensor, "rows channels"]:
    """The numbers that the codes stand for, in fp32. Each is off by at most absmax / 254."""
    return codes * (absmax / LARGEST)[:, None]


@shaped
def outlier_columns(x: Float[Tensor, "tokens channels"], threshold: float) -> Int64[Tensor, "outliers"]:
    """The channels in which at least one token reaches `threshold`."""
    if x.is_meta:  # numbers that are not there have no outliers: for the memory planner
        return torch.empty(0, dtype=torch.int64, device=x.device)
    return rearrange((x.abs().amax(dim=0) >= threshold).nonzero(), "outliers 1 -> outliers")


@shaped
def linear_int8(
    x: Float[Tensor, "tokens channels"],
    codes: Int8[Tensor, "out_channels channels"],
    absmax: Float[Tensor, "out_channels"],
    bias: Float[Tensor, "out_channels"] | None = None,
    threshold: float = THRESHOLD,
) -> Float[Tensor, "tokens out_channels"]:
    """LLM.int8(): x W^T + bias, in whole numbers but for the outlier columns of `x`. The result has x's dtype."""
    columns = outlier_columns(x, threshold)
    tokens, token_absmax = quantize_rows(x.index_fill(1, columns, 0.0))
    result = integer_product(tokens, codes).float()
    result.mul_((token_absmax / LARGEST)[:, None]).mul_(absmax / LARGEST)
    if len(columns):
        result += x[:, columns].float() @ dequantize_rows(codes[:, columns], absmax).mT
    return (result if bias is None else result.add_(bias)).to(x.dtype)


@shaped
def integer_product(
    tokens: Int8[Tensor, "tokens channels"], codes: Int8[Tensor, "out_channels channels"]
) -> Int[Tensor, "tokens out_channels"] | Float[Tensor, "tokens out_channels"]:
    """tokens times codes transposed: int32, or fp32 where there is no integer product for the device or these sizes."""
    on_cuda = tokens.is_cuda and all(size % CUDA_STEP == 0 for size in codes.shape)
    if not (on_cuda or tokens.is_meta or (tokens.is_cpu and "AVX512" in torch.backends.cpu.get_cpu_capability())):
        return tokens.float() @ codes.float().mT
    missing = max(0, CUDA_ROWS - len(tokens)) if on_cuda else 0
    return torch._int_mm(F.pad(tokens, (0, 0, 0, missing)) if missing else tokens, codes.mT)[: len(tokens)]


class Linear8bit(QuantizedLinear):
    """A linear layer with int8 weights. With `threshold` it multiplies as LLM.int8(), with None it is weight-only."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, threshold: float | None = THRESHOLD):
        super().__init__(in_features, out_features, bias)
        self.threshold = threshold
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("absmax", torch.zeros(out_features))

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, threshold: float | None = THRESHOLD) -> Self:
        """The same layer, its weights rounded. The bias is taken as it is."""
        quantized = cls._like(linear, threshold=threshold)
        quantized.weight, quantized.absmax = quantize_rows(linear.weight)
        return quantized

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out_channels channels"]:
        """The weights that the layer multiplies with."""
        return dequantize_rows(self.weight, self.absmax).to(dtype)

    @shaped
    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch out_channels"]:
        if self.threshold is None:
            return F.linear(x, self.dequantized(x.dtype), self.bias)
        tokens = rearrange(x, "... channels -> (...) channels")
        return linear_int8(tokens, self.weight, self.absmax, self.bias, self.threshold).view(*x.shape[:-1], self.out_features)
