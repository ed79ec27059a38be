"""How an answer is judged: by what it computes on several inputs, never by how it is written."""

import copy
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flux_lab.exercises.time_limit import HangingError, call
from flux_lab.exercises.values import TENSOR_LIKE, as_tensor, describe, difference, kind_of, parts_of, same

# An answer of the first kind is as good as one of the second. So is a NamedTuple as a tuple: it counts as one.
AS_GOOD = {(int, float), (list, tuple), (tuple, list)}
UNUSUAL = ". None of the usual mistakes gives this: compare one number by hand"
ROUNDED = ". So little is rounding: here every number must be computed in float64, constants too"


class Kind(enum.Enum):
    """What a verdict is about. Only RIGHT counts as passed."""

    RIGHT = "right"
    MISSING = "missing"
    RAISED = "raised"
    HANGING = "hanging"
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
    An answer may take `seconds` for each case. `tolerance`, relative and absolute, replaces the one of each dtype (`values.TOLERANCE`).
    """

    name: str
    reference: Callable
    cases: Callable[[], Iterable[dict[str, Any]]]
    misconceptions: tuple[Misconception, ...]
    tolerance: float | None = None
    seconds: float = 20.0


def judge(exercise: Exercise, answer: Any) -> Verdict:
    """The verdict on a learner's function."""
    if not callable(answer):
        return _wrong(exercise, Kind.WRONG_TYPE, f"expected a function, got {describe(answer)}")
    cases, results = list(exercise.cases()), []
    for case in cases:
        given = copy.deepcopy(case)
        try:
            results.append(call(answer, given.values(), exercise.seconds))
        except HangingError:
            text = f"it was stopped: it had not finished after {exercise.seconds:g} seconds {_for(case)}. Is there a loop without an end?"
            return _wrong(exercise, Kind.HANGING, text)
        except Exception as error:
            # Only a stub raises it without a message; torch says which operation is not implemented.
            if isinstance(error, NotImplementedError) and not str(error):
                return Verdict(Kind.MISSING, f"… {exercise.name}: not attempted yet")
            return _wrong(exercise, Kind.RAISED, f"it raised {type(error).__name__}: {error} {_for(case)}")
        if results[-1] is None:
            return _wrong(exercise, Kind.WRONG_TYPE, "it returned None. Is there a `return`?")
        if changed := [name for name in case if not _unchanged(given[name], case[name])]:
            text = f"it changed its input `{changed[0]}`. Compute a new value; `+=` and methods that end in `_` write into the old one"
            return _wrong(exercise, Kind.CHANGED_ITS_INPUT, text)
    return _compare(exercise, cases, results)


def _compare(exercise: Exercise, cases: list[dict[str, Any]], results: list[Any]) -> Verdict:
    """The verdict on what an answer returned in each case."""
    for mistake in exercise.misconceptions:
        wrong = (mistake.compute(**copy.deepcopy(case)) for case in cases)
        if all(same(result, value, exercise.tolerance) for result, value in zip(results, wrong, strict=True)):
            return _wrong(exercise, Kind.MISCONCEPTION, mistake.says)
    for result, case in zip(results, cases, strict=True):
        right = exercise.reference(**copy.deepcopy(case))
        if fault := _fault(result, right, exercise.tolerance):
            kind, text = fault
            advice = (ROUNDED if same(result, right) else UNUSUAL) if kind is Kind.WRONG_VALUE else ""
            return _wrong(exercise, kind, f"{text} {_for(case)}{advice}")
    return Verdict(Kind.RIGHT, f"✓ {exercise.name}: right in all {len(cases)} cases")


def _fault(result: Any, right: Any, tolerance: float | None) -> tuple[Kind, str] | None:
    """What is wrong with a result, at the first item that is, if it has items; None if it is right."""
    kind = kind_of(right)
    if kind_of(result) is not kind and (kind_of(result), kind) not in AS_GOOD:
        return Kind.WRONG_TYPE, f"expected {describe(right)}, got {describe(result)}"
    if kind in TENSOR_LIKE:
        tensor, right_tensor = as_tensor(result), as_tensor(right)
        if tensor.dtype != right_tensor.dtype:
            return Kind.WRONG_TYPE, f"expected {describe(right)}, got {describe(result)}"
        if tensor.shape != right_tensor.shape:
            return Kind.WRONG_SHAPE, f"expected the shape {list(right_tensor.shape)}, got {list(tensor.shape)}"
    elif (right_parts := parts_of(right)) is not None:
        parts = parts_of(result)
        if parts.keys() != right_parts.keys():
            return Kind.WRONG_SHAPE, f"expected {describe(right)}, got {describe(result)}"
        faults = ((name, _fault(parts[name], right_parts[name], tolerance)) for name in right_parts)
        return next(((fault[0], f"in its part `{name}`: {fault[1]}") for name, fault in faults if fault), None)
    return None if same(result, right, tolerance) else (Kind.WRONG_VALUE, difference(result, right))


def _unchanged(given: Any, before: Any) -> bool:
    """Whether an argument still holds what it held. A random generator is there to be used up."""
    if isinstance(given, torch.Generator):
        return True
    if isinstance(given, nn.Module):
        return same(given.state_dict(), before.state_dict(), tolerance=0)
    return same(given, before, tolerance=0)


def _wrong(exercise: Exercise, kind: Kind, text: str) -> Verdict:
    return Verdict(kind, f"✗ {exercise.name}: {text}")


def _for(case: dict[str, Any]) -> str:
    """The arguments, short enough to be read."""
    return "for " + ", ".join(f"{name}={describe(value)}" for name, value in case.items())
