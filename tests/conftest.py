"""Shared by all tests: random reference weights, tolerances, no network, and no record of solved exercises."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FLUX_LAB_PROGRESS"] = ""  # what tests solve is not the user's progress

import pytest
import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with random numbers, norms and biases too, scaled so that activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval().requires_grad_(False)


def copy_weights(ours: nn.Module, reference: nn.Module) -> nn.Module:
    """Our module with the reference's parameters and dtype: no key may be missing or left over."""
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours.to(next(reference.parameters()).dtype).eval().requires_grad_(False)


def assert_parity(actual, expected) -> None:
    """float32 within 1e-5; half precision to the last bit, which on one CPU it is."""
    half = expected.dtype in (torch.bfloat16, torch.float16)
    torch.testing.assert_close(actual, expected, rtol=0 if half else 1e-5, atol=0 if half else 1e-5)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
