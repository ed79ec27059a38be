"""The checkers: the reference passes, every catalogued mistake is named however it is written, everything else is told apart."""

import importlib
import itertools
import pkgutil

import pytest
import rewritten

from flux_lab.exercises import EXERCISES, Exercise, ExerciseError, check, judge
from flux_lab.exercises.checking import Kind, same

# Every mistake a second time, written in another way than in the catalogue: (exercise, mistake) -> answer, a file for each lesson.
REWRITTEN = {
    mistake: answer
    for file in pkgutil.iter_modules(rewritten.__path__)
    for mistake, answer in importlib.import_module(f"rewritten.{file.name}").REWRITTEN.items()
}
MISTAKES = [(exercise, wrong) for exercise in EXERCISES.values() for wrong in exercise.misconceptions]
EACH = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
EACH_MISTAKE = pytest.mark.parametrize(("exercise", "wrong"), MISTAKES, ids=[f"{each.name}: {wrong.name}" for each, wrong in MISTAKES])


def stub(*arguments):
    raise NotImplementedError


@EACH
def test_reference_passes(exercise: Exercise) -> None:
    verdict = judge(exercise, exercise.reference)
    assert verdict.kind is Kind.RIGHT
    assert verdict.text.startswith("✓")


@EACH
def test_there_are_three_mistakes_or_more_and_all_differ(exercise: Exercise) -> None:
    assert len(exercise.misconceptions) >= 3
    cases = list(exercise.cases())
    answers = [exercise.reference, *(wrong.compute for wrong in exercise.misconceptions)]
    for first, second in itertools.combinations(answers, 2):
        assert not all(same(first(**case), second(**case)) for case in cases)


@EACH_MISTAKE
def test_mistake_is_named_however_it_is_written(exercise: Exercise, wrong) -> None:
    for answer in (wrong.compute, REWRITTEN[exercise.name, wrong.name]):
        verdict = judge(exercise, lambda *given, answer=answer: answer(*given))
        assert (verdict.kind, verdict.text) == (Kind.MISCONCEPTION, f"✗ {exercise.name}: {wrong.says}")


@EACH
def test_other_failures_are_told_apart(exercise: Exercise) -> None:
    def raising(*given):
        raise KeyError("width")

    verdicts = [judge(exercise, answer).kind for answer in (stub, raising, lambda *given: None, lambda *given: "256", 3)]
    assert verdicts == [Kind.MISSING, Kind.RAISED, Kind.WRONG_TYPE, Kind.WRONG_TYPE, Kind.WRONG_TYPE]


@pytest.mark.parametrize(
    ("name", "answer", "kind", "said"),
    [
        ("image_tokens", lambda height, width: height / 16 * width / 16, Kind.WRONG_TYPE, "expected 64, got float 64"),
        ("image_tokens", lambda height, width: 5, Kind.WRONG_VALUE, "expected 64, got 5 for height=128, width=128"),
        ("euler_step", lambda x, v, here, there: (x + (there - here) * v)[:, :1], Kind.WRONG_SHAPE, "[1, 64, 64], got [1, 1, 64]"),
        ("euler_step", lambda x, v, here, there: x + (there - here) * v + 0.5, Kind.WRONG_VALUE, "by up to 0.5"),
        ("euler_step", lambda x, v, here, there: (x + (there - here) * v).double(), Kind.WRONG_TYPE, "got float64[1, 64, 64]"),
        ("euler_step", lambda x, v, here, there: x.add_(v, alpha=there - here), Kind.CHANGED_ITS_INPUT, "its input `latents`"),
    ],
)
def test_verdict_says_what_came(name: str, answer, kind: Kind, said: str) -> None:
    verdict = judge(EXERCISES[name], answer)
    assert verdict.kind is kind
    assert said in verdict.text


def test_check_prints_and_goes_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUX_LAB_STRICT", raising=False)
    check("image_tokens", stub)
    check("image_tokens", lambda height, width: height // 16 * (width // 16))
    assert capsys.readouterr().out.splitlines() == ["… image_tokens: not attempted yet", "✓ image_tokens: right in all 5 cases"]


def test_strict_check_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_LAB_STRICT", "1")
    check("euler_step", EXERCISES["euler_step"].reference)
    with pytest.raises(ExerciseError, match="euler_step: not attempted yet"):
        check("euler_step", stub)


def test_unknown_exercise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of .*'euler_step'.*, got 'euler'"):
        check("euler", stub)
