"""Exercises that name the mistake. `check(name, answer)` says ✓, "not attempted yet", or which misconception it recognises.

A lesson's exercises stand in the module with the lesson's stem, in its tuple `EXERCISES`. With FLUX_LAB_STRICT=1 in the environment
anything but ✓ raises ExerciseError: that is how the tests of the lessons read the verdict.
"""

import importlib
import os
import pkgutil
from typing import Any

from flux_lab.exercises.checking import Exercise, Misconception, Verdict, judge

__all__ = ["EXERCISES", "Exercise", "ExerciseError", "Misconception", "Verdict", "check", "judge"]

LESSONS = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__) if module.name != "checking"]
EXERCISES: dict[str, Exercise] = {exercise.name: exercise for lesson in LESSONS for exercise in lesson.EXERCISES}


class ExerciseError(AssertionError):
    """An answer that is missing or wrong, where FLUX_LAB_STRICT=1 demands a right one."""


def check(name: str, learner_object: Any) -> None:
    """Print what is right or wrong with an answer to the exercise `name`.

    Raises ValueError for an exercise that does not exist, and with FLUX_LAB_STRICT=1 ExerciseError for anything but ✓.
    """
    if name not in EXERCISES:
        raise ValueError(f"name: expected one of {list(EXERCISES)}, got {name!r}")
    verdict = judge(EXERCISES[name], learner_object)
    if not verdict.passed and os.environ.get("FLUX_LAB_STRICT") == "1":
        raise ExerciseError(verdict.text)
    print(verdict.text)
