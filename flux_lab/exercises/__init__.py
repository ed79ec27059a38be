"""Exercises that name the mistake. `check(name, answer)` says ✓, "not attempted yet", or which misconception it recognises.

A lesson's exercises stand in the module with the lesson's stem, in its tuple `EXERCISES`. With FLUX_LAB_STRICT=1 in the environment
anything but ✓ raises ExerciseError: that is how the tests of the lessons read the verdict. What was solved is kept by `progress`.
"""

import importlib
import os
import pkgutil
from typing import Any

from flux_lab.exercises import progress
from flux_lab.exercises.checking import Exercise, Misconception, Verdict, judge

__all__ = ["COURSE", "EXERCISES", "LESSONS", "Exercise", "ExerciseError", "Misconception", "Verdict", "check", "judge"]

# The lessons in the order of the course, numbered from 00.
COURSE = (
    *("welcome", "tokenization", "text_encoders", "latents_and_packing", "rope", "conditioning_and_adaln", "double_stream_blocks"),
    *("single_stream_blocks", "transformer", "sigma_schedule", "denoising_loop", "vae", "before_flux", "flux_in_16_gb", "making_it_fast"),
)
WRITTEN = {module.name for module in pkgutil.iter_modules(__path__)}
# The exercises of each lesson that has some, e.g. under "00_welcome".
LESSONS: dict[str, tuple[Exercise, ...]] = {
    f"{number:02}_{stem}": importlib.import_module(f"{__name__}.{stem}").EXERCISES for number, stem in enumerate(COURSE) if stem in WRITTEN
}
EXERCISES: dict[str, Exercise] = {exercise.name: exercise for exercises in LESSONS.values() for exercise in exercises}


class ExerciseError(AssertionError):
    """An answer that is missing or wrong, where FLUX_LAB_STRICT=1 demands a right one."""


def check(name: str, learner_object: Any) -> None:
    """Print what is right or wrong with an answer to the exercise `name`, and record it in the progress file.

    Raises ValueError for an exercise that does not exist, and with FLUX_LAB_STRICT=1 ExerciseError for anything but ✓.
    """
    if name not in EXERCISES:
        raise ValueError(f"name: expected one of {list(EXERCISES)}, got {name!r}")
    verdict = judge(EXERCISES[name], learner_object)
    progress.record(name, verdict)
    if not verdict.passed and os.environ.get("FLUX_LAB_STRICT") == "1":
        raise ExerciseError(verdict.text)
    print(verdict.text)
