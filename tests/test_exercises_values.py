"""When two values are the same, and what is said about them."""

import dataclasses
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import tensor

from flux_lab.exercises.values import describe, difference, same

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
Point = namedtuple("Point", ["x", "y"])


@dataclasses.dataclass
class Signal:
    shift: torch.Tensor


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (tensor([NAN, INF, -INF, 1.0]), tensor([NAN, INF, -INF, 1.00001]), True),
        (tensor([NAN, 1.0]), tensor([1.0, NAN]), False),
        (tensor([1.0]), tensor([1.01]), False),
        (tensor([1.0], dtype=torch.bfloat16), tensor([1.01], dtype=torch.bfloat16), True),
        (tensor(1 / 3, dtype=torch.float64), tensor(1 / 3).double(), True),
        (tensor(1 / 3, dtype=torch.float64), tensor(1 / 3, dtype=torch.float64) + 1e-4, False),
        (tensor([1.0]), tensor([[1.0]]), False),
        (tensor([1 + 2j]), tensor([1 + 2j]), True),
        (tensor([1 + 2j]), tensor([1 - 2j]), False),
        (tensor([1, 2]), tensor([1, 3]), False),
        (tensor([True, False]), tensor([True, False]), True),
        (tensor([]), tensor([]), True),
        (tensor(1.0), 1.0, False),
        (np.ones(3), np.ones(3), True),
        (np.ones(3), torch.ones(3), False),
        (Image.new("RGB", (3, 2), "red"), Image.new("RGB", (3, 2), "red"), True),
        (Image.new("RGB", (3, 2), "red"), Image.new("RGB", (3, 2), "blue"), False),
        ((tensor([1.0]), [1, "a"]), Point(tensor([1.0]), [1, "a"]), True),
        ((tensor([1.0]), [1, "a"]), (tensor([1.0]), [1, "b"]), False),
        ([1, 2], [1, 2, 3], False),
        ({"q": tensor([1.0])}, {"q": tensor([1.0])}, True),
        ({"q": tensor([1.0])}, {"k": tensor([1.0])}, False),
        (Signal(tensor([1.0])), Signal(tensor([1.0])), True),
        (Signal(tensor([1.0])), Signal(tensor([2.0])), False),
        (NAN, NAN, True),
        (0.1 + 0.2, 0.3, True),
        (64, 64.0, True),
        (HUGE, HUGE, True),
        (HUGE, HUGE + 1, False),
        (HUGE, 1.0, False),
        ("a", "a", True),
        ("1", 1, False),
        (None, None, True),
    ],
)
def test_same(first, second, expected: bool) -> None:
    assert same(first, second) is expected
    assert same(second, first) is expected


def test_tolerance_given() -> None:
    for first, second in ((1.0, 1.05), (tensor([1.0]), tensor([1.05])), ([tensor([1])], [tensor([1])])):
        assert same(first, second, tolerance=0.1)
    assert not same(tensor([1.0]), tensor([1.00001]), tolerance=0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.bfloat16), "bfloat16[2, 3]"),
        (np.zeros((2, 3), dtype=np.float32), "array float32[2, 3]"),
        (Image.new("L", (3, 2)), "a picture of 3 x 2 pixels in L"),
        (1 / 3, "float 0.3333"),
        (np.float32(0.5), "float32 0.5"),
        (True, "True"),
        (None, "None"),
        ("red", "'red'"),
        ("x" * 61, f"'{'x' * 60}…'"),
        ([1, 2], "[1, 2]"),
        (list(range(77)), "[0, 1, 2, 3, 4, 5, 6, 7, … 77 items]"),
        ((torch.zeros(1), "a"), "tuple(float32[1], 'a')"),
        (Point(1, 2), "Point(1, 2)"),
        ({"q": 1}, "dict(['q'] 1)"),
        (Signal(torch.zeros(1)), "Signal(.shift float32[1])"),
        (torch.float16, "torch.float16"),
        (object(), "a object"),
    ],
)
def test_describe(value, text: str) -> None:
    assert describe(value) == text


@pytest.mark.parametrize(
    ("result", "right", "text"),
    [
        (tensor([1.0, 2.5]), tensor([1.0, 2.0]), "it differs from the right answer by up to 0.5"),
        (tensor([INF, 2.0]), tensor([INF, 5.0]), "it differs from the right answer by up to 3"),
        (tensor([NAN, 2.0]), tensor([1.0, 2.0]), "1 of 2 numbers are NaN; in the right answer 0 are, or others"),
        (1.15001, 1.15, "expected 1.15, got 1.15001"),
        ("red cub", "red cube", "expected 'red cube', got 'red cub'"),
        ("x" * 99 + "a", "x" * 99 + "b", f"expected '…{'x' * 30}b', got '…{'x' * 30}a'"),
    ],
)
def test_difference(result, right, text: str) -> None:
    assert difference(result, right) == text
