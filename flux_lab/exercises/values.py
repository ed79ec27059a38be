"""Values that answers return: when two of them are the same, and how they are described in a sentence."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# How far two right answers may differ: they may add the same numbers in another order. Other dtypes are compared exactly.
# A float64 answer may hold a constant in float32, PyTorch's default.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}
TOLERANCE |= {torch.complex128: 1e-5, torch.complex64: 1e-4, float: 1e-6}

TENSOR_LIKE = (Tensor, np.ndarray, Image.Image)
KINDS = (*TENSOR_LIKE, bool, int, float, str, tuple, list, dict)
PLAIN = (int, type(None), torch.dtype, torch.device)
SHOWN_ITEMS, SHOWN_LETTERS = 8, 60


def same(first: Any, second: Any, tolerance: float | None = None) -> bool:
    """Whether two values agree up to rounding, part by part. NaN agrees with NaN, a list with a tuple of the same.

    `tolerance`, relative and absolute, replaces TOLERANCE.
    """
    parts, others = parts_of(first), parts_of(second)
    if parts is not None and others is not None:
        return parts.keys() == others.keys() and all(same(parts[name], others[name], tolerance) for name in parts)
    kind, other = kind_of(first), kind_of(second)
    if kind in TENSOR_LIKE and kind is other:
        return _same_tensors(as_tensor(first), as_tensor(second), tolerance)
    if {kind, other} <= {bool, int, float}:
        return first == second or (float in (kind, other) and _same_floats(first, second, tolerance))
    return kind is other and bool(first == second)


def _same_floats(first: float, second: float, tolerance: float | None) -> bool:
    tolerance = TOLERANCE[float] if tolerance is None else tolerance
    try:
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(first) and math.isnan(second))
    except OverflowError:  # one is an int that no float can hold
        return False


def _same_tensors(first: Tensor, second: Tensor, tolerance: float | None) -> bool:
    if first.shape != second.shape:
        return False
    if tolerance is None:
        tolerance = max(TOLERANCE.get(tensor.dtype, 0.0) for tensor in (first, second))
    return torch.allclose(_wide(first), _wide(second), rtol=tolerance, atol=tolerance, equal_nan=True)


def _wide(tensor: Tensor) -> Tensor:
    """The same numbers with as many digits as there are; real ones have an imaginary part of zero."""
    return tensor.detach().to("cpu", torch.complex128)


def as_tensor(value: Any) -> Tensor:
    """A tensor, an array or an image as a tensor."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def kind_of(value: Any) -> type:
    """The type, where subclasses such as NamedTuples and parameters count as what they extend, and bool not as int."""
    return next((kind for kind in KINDS if isinstance(value, kind)), type(value))


def parts_of(value: Any) -> dict[str, Any] | None:
    """What a tuple, a list, a dict or a dataclass holds, by what is written to get it; None for all else."""
    if isinstance(value, tuple | list):
        return {f"[{index}]": item for index, item in enumerate(value)}
    if isinstance(value, Mapping):
        return {f"[{key!r}]": item for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def difference(result: Any, right: Any) -> str:
    """By how much two different values of one kind, and of one shape if they have a shape, differ."""
    if isinstance(right, str):
        return "expected {}, got {}".format(*_from_where_they_part(right, result))
    if kind_of(right) not in TENSOR_LIKE:
        words = describe if describe(result) != describe(right) else repr
        return f"expected {words(right)}, got {words(result)}"
    ours, theirs = (_wide(as_tensor(value)) for value in (result, right))
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return (
            f"{int(ours.isnan().sum())} of {ours.numel()} numbers are NaN; in the right answer {int(theirs.isnan().sum())} are, or others"
        )
    apart = (ours - theirs).abs()[(ours != theirs) & ~ours.isnan()]
    return f"it differs from the right answer by up to {apart.max().item():.3g}"


def _from_where_they_part(*texts: str) -> list[str]:
    """Long texts without most of what is equal at their beginnings."""
    equal = sum(1 for _ in itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))
    start = max(0, equal - SHOWN_LETTERS // 2)
    return [describe("…" * (start > 0) + text[start:]) for text in texts]


def describe(value: Any) -> str:
    """A value in a few words: numbers, short texts and lists as they are, tensors by dtype and shape."""
    if isinstance(value, Tensor | np.ndarray):
        array = "array " if isinstance(value, np.ndarray) else ""
        return f"{array}{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Image.Image):
        return f"a picture of {value.width} x {value.height} pixels in {value.mode}"
    if isinstance(value, float):
        return f"float {value:.4g}"
    if isinstance(value, PLAIN):
        return str(value)
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN_LETTERS else value[:SHOWN_LETTERS] + "…")
    if (parts := parts_of(value)) is not None:
        return _describe_parts(value, parts)
    return f"{type(value).__name__} {value}" if isinstance(value, np.generic) else f"a {type(value).__name__}"


def _describe_parts(value: Any, parts: dict[str, Any]) -> str:
    """A list in brackets; all else under its type's name, with keys and fields if it has them."""
    indexed = isinstance(value, tuple | list)
    shown = [describe(item) if indexed else f"{name} {describe(item)}" for name, item in list(parts.items())[:SHOWN_ITEMS]]
    inside = ", ".join(shown) + (f", … {len(parts)} items" if len(parts) > SHOWN_ITEMS else "")
    return f"[{inside}]" if isinstance(value, list) else f"{type(value).__name__}({inside})"
