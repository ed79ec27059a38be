"""flux_lab.inference.int8: rows of whole numbers, LLM.int8(), and the same from bitsandbytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux_lab.inference import int8
from flux_lab.inference.int8 import Linear8bit, dequantize_rows, integer_product, linear_int8, outlier_columns, quantize_rows


def with_outliers(tokens=9, channels=48, columns=(5, 17)):
    """Tokens, all of which are large in the same few channels, as those of trained models are."""
    x = torch.randn(tokens, channels).clamp(-4, 4)
    x[:, list(columns)] = 40 + 20 * torch.rand(tokens, len(columns))
    return x


def test_rounding_to_rows():
    matrix = torch.randn(7, 40) * torch.logspace(-3, 3, 7)[:, None]
    codes, absmax = quantize_rows(matrix)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.abs().amax(dim=1), torch.full((7,), 127, dtype=torch.int8))
    assert torch.equal(absmax, matrix.abs().amax(dim=1))
    # Half a step is the largest error there can be.
    assert ((dequantize_rows(codes, absmax) - matrix).abs() <= absmax[:, None] / 254 * 1.0001).all()


def test_a_row_of_zeros_stays_one():
    codes, absmax = quantize_rows(torch.zeros(2, 8))
    assert torch.equal(dequantize_rows(codes, absmax), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_equal_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = torch.randn(13, 64).to(dtype)
    codes, absmax = quantize_rows(matrix)
    # In half precision theirs divides 127 by the largest number in fp32 as well, then multiplies.
    expected, expected_absmax, _ = functional.int8_vectorwise_quant(matrix.clone())
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, expected_absmax)
    torch.testing.assert_close(dequantize_rows(codes, absmax), functional.int8_vectorwise_dequant(expected, expected_absmax))


def test_integer_product_is_exact():
    tokens, codes = (torch.randint(-127, 128, (rows, 40), dtype=torch.int8) for rows in (5, 11))
    assert torch.equal(integer_product(tokens, codes).int(), tokens.int() @ codes.int().mT)


def test_integer_product_where_there_is_none(monkeypatch):
    tokens, codes = (torch.randint(-127, 128, (rows, 40), dtype=torch.int8) for rows in (5, 11))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert integer_product(tokens, codes).is_floating_point()
    assert torch.equal(integer_product(tokens, codes).int(), tokens.int() @ codes.int().mT)


def test_outlier_columns():
    assert outlier_columns(with_outliers(), 6.0).tolist() == [5, 17]
    assert outlier_columns(-with_outliers(), 6.0).tolist() == [5, 17]
    assert len(outlier_columns(with_outliers(), 100.0)) == 0


def test_the_outlier_split_is_worth_it():
    x, linear = with_outliers(), nn.Linear(48, 24)
    exact = linear(x)
    codes, absmax = quantize_rows(linear.weight)
    split, plain = (linear_int8(x, codes, absmax, linear.bias, threshold=threshold) for threshold in (6.0, 1e9))
    assert (split - exact).norm() < 0.5 * (plain - exact).norm()


@pytest.mark.parametrize("threshold", [6.0, 1e9], ids=["outliers apart", "no outliers"])
def test_product_equals_bitsandbytes(threshold):
    pytest.importorskip("bitsandbytes")
    x, weight, bias = with_outliers(), torch.randn(24, 48), torch.randn(24)
    codes, absmax = quantize_rows(weight)
    tokens, token_absmax, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), threshold)
    expected, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, tokens, codes, token_absmax, absmax, columns, bias)
    # Theirs multiplies by 6.200124e-05 where 1 / 127^2 is 6.200012e-05.
    torch.testing.assert_close(linear_int8(x, codes, absmax, bias, threshold), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threshold", [6.0, None], ids=["LLM.int8()", "weight only"])
def test_layer(threshold, bias, dtype):
    linear = nn.Linear(40, 24, bias=bias).to(dtype)
    quantized = Linear8bit.from_linear(linear, threshold=threshold)
    x = torch.randn(2, 3, 40).to(dtype)
    given = quantized(x)
    assert given.dtype == dtype
    assert given.shape == (2, 3, 24)
    assert (given - linear(x)).norm() < 0.02 * linear(x).norm()
    if threshold is None:
        assert torch.equal(given, F.linear(x, quantized.dequantized(dtype), linear.bias))


def test_a_planted_bug_is_noticed(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(int8, "LARGEST", 128)
    matrix = torch.randn(13, 64)
    assert not torch.equal(quantize_rows(matrix)[0], functional.int8_vectorwise_quant(matrix.clone())[0])
