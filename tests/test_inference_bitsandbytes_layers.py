"""flux_lab.inference.bitsandbytes_layers: that package's layers in the place of ours."""

import sys

import pytest
import torch
from test_inference_quantization import EVERY_SCHEME, make
from torch import nn

from flux_lab.inference.quantization import quantize


@EVERY_SCHEME
def test_bitsandbytes_layers_take_their_place(scheme):
    layers = pytest.importorskip("bitsandbytes.nn")
    # Rows in whole blocks of 64: on a CPU, bitsandbytes 0.50.2 turns rows of 32 or 160 weights back with the scales of other blocks.
    ours, theirs = (nn.Sequential(nn.Linear(128, 192), nn.GELU(), nn.Linear(192, 64, bias=False)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 128)
    expected = quantize(ours, scheme)(x)
    quantize(theirs, scheme, backend="bitsandbytes")
    assert isinstance(theirs[0], {"int8": layers.Linear8bitLt, "nf4": layers.Linear4bit}[scheme])
    torch.testing.assert_close(theirs(x), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_a_missing_backend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ImportError, match=r"backend='bitsandbytes': the package is missing; `pip install 'flux-lab\[bitsandbytes\]'`"):
        quantize(make(), "int8", backend="bitsandbytes")
