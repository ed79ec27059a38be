"""Linear layers, made to be fast: several as one matrix product, by the better of the processor's two libraries.

PyTorch on an x86 processor has two libraries of matrix products: MKL, which `F.linear` asks for float32, and oneDNN, which it asks for
bfloat16 and for convolutions. On some processors oneDNN is the quicker one for float32 too, except where the product is so small that
calling it costs more than that gains. PyTorch's name for it is the operation that compiled code calls, `mkldnn::_linear_pointwise`.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# From so many weights on oneDNN pays, for few rows and for many. Lesson 14 draws where it begins on your machine.
LARGE = 2**18


def check_plain(layers: Iterable[nn.Module]) -> None:
    """Raises ValueError for a layer that is not a plain `nn.Linear`."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            found = type(layer).__name__
            raise ValueError(f"pipe: expected plain linear layers, got {found}: make it fast before it is quantized or hoisted")


class FastLinear(nn.Module):
    """The outputs of all `linears` side by side. The weights of a single one are shared.

    Raises ValueError for a layer that is not a plain `nn.Linear`.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        check_plain(linears)
        self.weight, self.bias = linears[0].weight, linears[0].bias
        if len(linears) > 1:
            self.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        if len(linears) > 1 and self.bias is not None:
            self.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
        two_libraries = self.weight.is_cpu and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
        self.onednn = two_libraries and self.weight.dtype == torch.float32 and self.weight.numel() >= LARGE

    def forward(self, x: Tensor) -> Tensor:
        if self.onednn and not torch.compiler.is_compiling():  # the compiler cannot take oneDNN's operation
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)
