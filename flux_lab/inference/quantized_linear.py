"""What the quantized linear layers share: how they are made from an nn.Linear, and that a cast leaves their scales alone."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is held as codes and scales, in buffers, and whose bias is held as a parameter.

    `.to(dtype)` casts the bias alone. The layer computes in the dtype of its input; it is for inference and has no gradient.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def _like(cls, linear: nn.Linear, **options: Any) -> Self:
        """An empty layer of the same sizes, with the bias of `linear`."""
        with torch.device("meta"):
            quantized = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        if linear.bias is not None:
            quantized.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return quantized

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
