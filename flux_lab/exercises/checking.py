"""How an answer is judged: by what it computes on several inputs, never by how it is written."""

import copy
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# How far two right answers may differ: they may add the same numbers in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}


class Kind(enum.Enum):
    """What a verdict is about. Only RIGHT counts as passed."""

    RIGHT = "right"
    MISSING = "missing"
    RAISED = "raised"
    MISCONCEPTION = "misconception"
    WRONG_TYPE = "wrong type"
    WRONG_SHAPE = "wrong shape"
    WRONG_VALUE = "wrong value"
    CHANGED_ITS_INPUT = "changed its input"


@dataclass(frozen=True)
class Verdict:
    kind: Kind
    text: str

    @property
    def passed(self) -> bool:
        return self.kind is Kind.RIGHT


@dataclass(frozen=True)
class Misconception:
    """A wrong answer that people really give: `compute` gives it, `says` tells what is wrong with it."""

    name: str
    compute: Callable
    says: str


@dataclass(frozen=True)
class Exercise:
    """What to compute and how to recognise wrong ideas. `cases()` gives the arguments of several calls, the same at every run.

    A misconception is recognised when an answer agrees with it in every case, so the cases must tell all of them apart.
    """

    name: str
    reference: Callable
    cases: Callable[[], Iterable[dict[str, Any]]]
    misconceptions: tuple[Misconception, ...]


def judge(exercise: Exercise, answer: Any) -> Verdict:
    """The verdict on a learner's function."""
    if not callable(answer):
        return Verdict(Kind.WRONG_TYPE, f"✗ {exercise.name}: expected a function, got {_describe(answer)}")
    cases, results = list(exercise.cases()), []
    for case in cases:
        given = copy.deepcopy(case)
        try:
            results.append(answer(*given.values()))
        except NotImplementedError:
            return Verdict(Kind.MISSING, f"… {exercise.name}: not attempted yet")
        except Exception as error:
            return Verdict(Kind.RAISED, f"✗ {exercise.name}: it raised {type(error).__name__}: {error} {_for(case)}")
        if results[-1] is None:
            return Verdict(Kind.WRONG_TYPE, f"✗ {exercise.name}: it returned None. Is there a `return`?")
        if changed := [name for name in case if not same(given[name], case[name])]:
            text = f"it changed its input `{changed[0]}`. Compute a new value; `+=` and methods that end in `_` write into the old one"
            return Verdict(Kind.CHANGED_ITS_INPUT, f"✗ {exercise.name}: {text}")
    return _compare(exercise, cases, results)


def _compare(exercise: Exercise, cases: list[dict[str, Any]], results: list[Any]) -> Verdict:
    """The verdict on what an answer returned in each case."""
    for wrong in exercise.misconceptions:
        if all(same(result, wrong.compute(**case)) for result, case in zip(results, cases, strict=True)):
            return Verdict(Kind.MISCONCEPTION, f"✗ {exercise.name}: {wrong.says}")
    for result, case in zip(results, cases, strict=True):
        right = exercise.reference(**case)
        if type(result) is not type(right) or (isinstance(right, Tensor) and result.dtype != right.dtype):
            text = f"expected {_describe(right)}, got {_describe(result)}"
            return Verdict(Kind.WRONG_TYPE, f"✗ {exercise.name}: {text} {_for(case)}")
        if isinstance(right, Tensor) and result.shape != right.shape:
            text = f"expected the shape {list(right.shape)}, got {list(result.shape)}"
            return Verdict(Kind.WRONG_SHAPE, f"✗ {exercise.name}: {text} {_for(case)}")
        if not same(result, right):
            text = f"{_difference(result, right)} {_for(case)}. None of the usual mistakes gives this: compare one number by hand"
            return Verdict(Kind.WRONG_VALUE, f"✗ {exercise.name}: {text}")
    return Verdict(Kind.RIGHT, f"✓ {exercise.name}: right in all {len(cases)} cases")


def same(first: Any, second: Any) -> bool:
    """Whether two values are the same number, or tensors of one shape with the same numbers up to rounding."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape:
            return False
        tolerance = max(TOLERANCE.get(value.dtype, 0.0) for value in (first, second))
        return torch.allclose(first.double(), second.double(), rtol=tolerance, atol=tolerance)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    return first == second


def _difference(result: Any, right: Any) -> str:
    if isinstance(right, Tensor):
        return f"it differs from the right answer by up to {(result.double() - right.double()).abs().max().item():.3g}"
    return f"expected {right!r}, got {result!r}"


def _for(case: dict[str, Any]) -> str:
    """The arguments, short enough to be read."""
    return "for " + ", ".join(f"{name}={_describe(value)}" for name, value in case.items())


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, int | float):
        return f"{type(value).__name__} {value:.4g}" if isinstance(value, float) else str(value)
    return f"a {type(value).__name__}"
