"""flux_lab.inference.quantized_linear: a cast or a move leaves codes and scales alone."""

import copy

import pytest
import torch
from torch import nn

from flux_lab.inference.quantization import SCHEMES


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cast_leaves_codes_and_scales_alone(scheme):
    quantized = SCHEMES[scheme].from_linear(nn.Linear(40, 24))
    before = copy.deepcopy(dict(quantized.named_buffers()))
    quantized.bfloat16()
    assert quantized.bias.dtype == torch.bfloat16
    for name, tensor in quantized.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_made_from_a_linear(scheme, bias):
    linear = nn.Linear(40, 24, bias=bias)
    quantized = SCHEMES[scheme].from_linear(linear)
    assert not any(tensor.requires_grad for tensor in [*quantized.parameters(), *quantized.buffers()])
    assert quantized.bias is None or torch.equal(quantized.bias, linear.bias)
    assert "in_features=40, out_features=24" in repr(quantized)
    assert all(tensor.is_meta for tensor in quantized.to("meta").state_dict().values())
