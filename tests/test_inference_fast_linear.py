"""flux_lab.inference.fast_linear: the same numbers as the layers it is made of, from either library."""

import pytest
import torch
from torch import nn

from flux_lab.inference.fast_linear import LARGE, FastLinear

INPUTS = {"small": 12, "large": 600}  # with 500 outputs: on both sides of LARGE
assert INPUTS["small"] * 500 < LARGE <= INPUTS["large"] * 500


def rows_of(inputs, dtype=torch.float32):
    """A part of wider rows, as it is passed in the single-stream block: not contiguous."""
    return torch.randn(2, 7, inputs + 5, dtype=dtype)[..., 5:]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@torch.no_grad()
def test_equals_its_layers(inputs, bias):
    layers, rows = [nn.Linear(inputs, outputs, bias=bias) for outputs in (200, 300)], rows_of(inputs)
    wanted = torch.cat([layer(rows) for layer in layers], dim=-1)
    torch.testing.assert_close(FastLinear(*layers)(rows), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@torch.no_grad()
def test_a_single_layer_is_shared(inputs):
    layer, rows = nn.Linear(inputs, 500), rows_of(inputs)
    fast = FastLinear(layer)
    assert fast.weight is layer.weight
    assert fast.bias is layer.bias
    torch.testing.assert_close(fast(rows), layer(rows), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_libraries_give_the_same(monkeypatch):
    """Where PyTorch has only one of them, on ARM for example, that one is asked."""
    layer, rows = nn.Linear(600, 500), rows_of(600)
    wanted = FastLinear(layer)(rows)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    alone = FastLinear(layer)
    assert not alone.onednn
    torch.testing.assert_close(alone(rows), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # 5 s of compiling
def test_compiled():
    layer, rows = FastLinear(nn.Linear(600, 500)), rows_of(600)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(layer)(rows), layer(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_it_was(dtype):
    layer, rows = nn.Linear(600, 500, dtype=dtype), rows_of(600, dtype)
    assert torch.equal(FastLinear(layer)(rows), layer(rows))


def test_only_plain_layers():
    message = "pipe: expected plain linear layers, got Identity: make it fast before it is quantized or hoisted"
    with pytest.raises(ValueError, match=message):
        FastLinear(nn.Linear(4, 3), nn.Identity())
