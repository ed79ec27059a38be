"""What was solved and when, in one JSON file of this machine. Nothing is sent anywhere.

The file is the one that FLUX_LAB_PROGRESS names, else `flux-lab/progress.json` in the user's data folder. Nothing is recorded

- where FLUX_LAB_PROGRESS is set to nothing (tests and builds of the notebooks do so), or FLUX_LAB_STRICT=1 runs prepared solutions;
- for a stub that was left as it is;
- after an exercise was solved: attempts are counted up to the first right answer.
"""

import dataclasses
import datetime
import itertools
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_lab.exercises.checking import Exercise, Kind, Verdict
from flux_lab.files import write_json

VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One exercise: how many answers were checked, and the time (ISO 8601, UTC) of the first right one."""

    attempts: int = 0
    solved: str | None = None

    def __post_init__(self):
        if type(self.attempts) is not int or not isinstance(self.solved, str | None):
            raise TypeError(f"expected a whole number of attempts and a time or null, got {self.attempts!r} and {self.solved!r}")
        if self.solved is not None:
            datetime.datetime.fromisoformat(self.solved)


def progress_file() -> Path | None:
    """Where progress is kept; None where it is not to be kept."""
    named = os.environ.get("FLUX_LAB_PROGRESS")
    if named is not None:
        return Path(named) if named else None
    return user_data_folder() / "flux-lab" / "progress.json"


def user_data_folder() -> Path:
    """Where programs keep a user's data on this system."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")


# ---- recording ----------------------------------------------------------------------------------------------------------


def record(name: str, verdict: Verdict) -> None:
    """Count an answer to the exercise `name`. A file that cannot be written is a warning: the verdict is what matters."""
    if os.environ.get("FLUX_LAB_STRICT") == "1" or verdict.kind is Kind.MISSING:
        return
    try:
        if (file := progress_file()) is None:
            return
        entries = read(file)
        before = entries.get(name, Entry())
        if before.solved is None:
            entries[name] = Entry(before.attempts + 1, now() if verdict.passed else None)
            write(file, entries)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        warnings.warn(f"progress is not kept: {error}", stacklevel=3)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read(file: Path) -> dict[str, Entry]:
    """The entries by the exercises' names. A file that cannot be understood is renamed, with a warning."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark in front
        return {name: Entry(**entry) for name, entry in content["exercises"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        kept = set_aside(file, "broken")
        warnings.warn(f"{file} is not a progress file ({type(error).__name__}: {error}). It was renamed to {kept.name}", stacklevel=2)
        return {}


def write(file: Path, entries: Mapping[str, Entry]) -> None:
    """Of two that write at the same moment the last one stays."""
    content = {"version": VERSION, "exercises": {name: dataclasses.asdict(entry) for name, entry in entries.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)


def set_aside(file: Path, why: str) -> Path:
    """Rename a file to a name that is free, and return that."""
    names = (file.with_name(f"{file.name}.{why}{number}") for number in itertools.chain([""], itertools.count(2)))
    free = next(name for name in names if not name.exists())
    file.rename(free)
    return free


# ---- reading it back ----------------------------------------------------------------------------------------------------


def summary(lessons: Mapping[str, tuple[Exercise, ...]], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What is solved, as it is shared in a workshop: numbers, and each exercise under its lesson. No names, no paths."""
    table = {
        lesson: {exercise.name: dataclasses.asdict(entries.get(exercise.name, Entry())) for exercise in exercises}
        for lesson, exercises in lessons.items()
    }
    every = [entry for exercises in table.values() for entry in exercises.values()]
    return {"solved": sum(entry["solved"] is not None for entry in every), "exercises": len(every), "lessons": table}


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary as text: a block for each lesson, a line for each exercise, then the sum."""
    wide = max((len(name) for exercises in summary["lessons"].values() for name in exercises), default=0)
    text = []
    for lesson, exercises in summary["lessons"].items():
        text.append(f"{lesson.replace('_', ' ')}: {sum(entry['solved'] is not None for entry in exercises.values())} of {len(exercises)}")
        text += [f"  [{'x' if entry['solved'] else ' '}] {name:{wide}}  {state(entry)}".rstrip() for name, entry in exercises.items()]
    return [*text, f"{summary['solved']} of {summary['exercises']} exercises solved"]


def state(entry: dict[str, Any]) -> str:
    attempts = "1 attempt" if entry["attempts"] == 1 else f"{entry['attempts']} attempts"
    if entry["solved"]:
        return f"{datetime.datetime.fromisoformat(entry['solved']).astimezone():%Y-%m-%d %H:%M}, {attempts}"
    return attempts if entry["attempts"] else ""
