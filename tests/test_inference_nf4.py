"""flux_lab.inference.nf4: the code books, blocks, double quantization, and the same from bitsandbytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux_lab.inference import nf4
from flux_lab.inference.nf4 import (
    BLOCK,
    NF4_CODE,
    LinearNF4,
    dequantize_blocks,
    dequantize_nf4,
    dynamic_code,
    normal_float_code,
    quantize_blocks,
    quantize_nf4,
)

CODE = torch.tensor(NF4_CODE)
# The second has a short last block, the third an odd number of weights, the fourth more than one block of scales.
SHAPES = [(6, 64), (5, 24), (7, 9), (150, 128)]


def halves(packed):
    """The 4-bit numbers of each byte. After an odd number of weights the last half means nothing."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


def test_the_code_book_is_what_the_quantiles_say():
    torch.testing.assert_close(normal_float_code(), CODE, rtol=0, atol=2e-7)


def test_code_books_equal_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(CODE, functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_code(), functional.create_dynamic_map())


def test_blocks_take_the_nearest_level():
    numbers = torch.randn(100)
    indices, absmax = quantize_blocks(numbers, CODE, 32)
    assert torch.equal(absmax, torch.stack([part.abs().max() for part in numbers.split(32)]))
    scaled = torch.cat([part / part.abs().max() for part in numbers.split(32)])
    assert torch.equal(indices.long(), (scaled[:, None] - CODE).abs().argmin(dim=1))
    expected = CODE[indices.long()] * absmax.repeat_interleave(32)[:100]
    assert torch.equal(dequantize_blocks(indices, absmax, CODE, 32), expected)


def test_a_block_of_zeros_stays_one():
    quantized = quantize_nf4(torch.zeros(2, BLOCK))
    assert torch.equal(dequantize_nf4(quantized, 2, BLOCK), torch.zeros(2, BLOCK))


@pytest.mark.parametrize("shape", SHAPES)
def test_matrix_equals_bitsandbytes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = torch.randn(shape).to(dtype)
    quantized = quantize_nf4(matrix)
    packed, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    assert torch.equal(halves(quantized.weight)[: matrix.numel()], halves(packed.flatten())[: matrix.numel()])
    torch.testing.assert_close(quantized.offset, state.offset)
    torch.testing.assert_close(quantized.nested_absmax, state.state2.absmax, rtol=1e-6, atol=1e-7)
    # The mean's last bit may decide which of two levels is nearer.
    assert (quantized.absmax != state.absmax.flatten()).sum() <= 1
    state.dtype = torch.float32
    expected = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(dequantize_nf4(quantized, *shape), expected.reshape(shape), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 9), (150, 129)])
def test_piece_by_piece_is_the_same(shape, dtype, monkeypatch):
    quantized = quantize_nf4(torch.randn(shape))
    whole = dequantize_nf4(quantized, *shape, dtype)
    assert whole.dtype == dtype
    assert torch.equal(whole, dequantize_nf4(quantized, *shape).to(dtype))
    monkeypatch.setattr(nf4, "PIECE", 4)
    assert torch.equal(dequantize_nf4(quantized, *shape, dtype), whole)


def test_what_a_weight_costs():
    quantized = quantize_nf4(torch.randn(512, 512))
    bits = 8 * sum(tensor.nbytes for tensor in quantized) / 512**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer(shape, bias, dtype):
    linear = nn.Linear(shape[1], shape[0], bias=bias).to(dtype)
    quantized = LinearNF4.from_linear(linear)
    x = torch.randn(2, 3, shape[1]).to(dtype)
    assert torch.equal(quantized(x), F.linear(x, quantized.dequantized(dtype), linear.bias))
    error = (quantized.dequantized() - linear.weight.float()).norm() / linear.weight.float().norm()
    assert error < 0.12
    empty = LinearNF4(shape[1], shape[0], bias)
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in quantized.state_dict().items()
    }


def test_fits_normal_weights_better_than_even_levels():
    numbers = torch.randn(4096)
    even = torch.linspace(-1, 1, 16)
    errors = [(dequantize_blocks(*quantize_blocks(numbers, code, BLOCK), code, BLOCK) - numbers).norm() for code in (CODE, even)]
    assert errors[0] < errors[1]


def test_a_planted_bug_is_noticed(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = torch.randn(6, 64)
    expected = functional.quantize_4bit(matrix, quant_type="nf4")[0].flatten()
    swapped = quantize_nf4(matrix).weight
    assert not torch.equal(swapped >> 4 | swapped << 4, expected)
    even = torch.linspace(-1, 1, 16)
    monkeypatch.setattr(nf4, "code_books", lambda device: (even, None, dynamic_code()))
    assert not torch.equal(quantize_nf4(matrix).weight, expected)
