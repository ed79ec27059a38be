"""The checkers: the reference passes, every catalogued mistake is named however it is written, everything else is told apart."""

import dataclasses
import importlib
import itertools
import pkgutil
from typing import NamedTuple

import pytest
import rewritten
import torch

from flux_lab import exercises
from flux_lab.exercises import COURSE, EXERCISES, LESSONS, Exercise, ExerciseError, Misconception, check, judge
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


def test_every_lesson_module_is_counted_once() -> None:
    machinery = {"checking", "progress", "time_limit", "values"}
    assert {module.name for module in pkgutil.iter_modules(exercises.__path__)} - machinery <= set(COURSE)
    names = [exercise.name for lesson in LESSONS.values() for exercise in lesson]
    assert len(names) == len(set(names)) == len(EXERCISES)


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
        assert not all(same(first(**case), second(**case), exercise.tolerance) for case in cases)


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


def join_with_float_weights(left: torch.Tensor, right: torch.Tensor, overlap: int) -> torch.Tensor:
    faded = torch.lerp(left[..., -overlap:], right[..., :overlap], (torch.arange(overlap) / overlap).to(left))
    return torch.cat([left[..., :-overlap], faded, right[..., overlap:]], dim=-1)


def floats_inside(name: str):
    """The right answer, computed in float32 and given back in the dtype that was asked for."""

    def answer(*given):
        inside = [value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in given]
        return EXERCISES[name].reference(*inside).to(given[0].dtype)

    return answer


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("join_tiles", join_with_float_weights),
        ("shift_sigmas", lambda sigmas, mu: torch.exp(torch.tensor(mu)) * sigmas / (1 + (torch.exp(torch.tensor(mu)) - 1) * sigmas)),
        ("flux_velocity", lambda x, noise, kept: noise - (x - (1 - torch.tensor(kept)).sqrt() * noise) / torch.tensor(kept).sqrt()),
        *((name, floats_inside(name)) for name in ("quick_gelu", "unscale_latents", "predicted_picture", "modulated", "rotate_pairs")),
    ],
)
def test_float32_inside_is_right(name: str, answer) -> None:
    assert judge(EXERCISES[name], answer).kind is Kind.RIGHT


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("rope_frequencies", lambda dim, theta: (theta ** -(torch.arange(0, dim, 2) / dim)).double()),
        (
            "head_angles",
            lambda ids, axes, theta: torch.cat([ids[:, [i]] * theta ** -(torch.arange(0, n, 2) / n) for i, n in enumerate(axes)], 1),
        ),
    ],
)
def test_float32_inside_is_named_where_float64_is_the_task(name: str, answer) -> None:
    verdict = judge(EXERCISES[name], answer)
    assert verdict.kind is Kind.WRONG_VALUE
    assert verdict.text.endswith("here every number must be computed in float64, constants too")


def test_not_every_nan_is_a_logarithm_of_logvar() -> None:
    verdict = judge(EXERCISES["kl_divergence"], lambda mean, logvar: mean.sum(dim=(1, 2, 3)) * float("nan"))
    assert verdict.kind is Kind.WRONG_VALUE
    assert "numbers are NaN" in verdict.text


# ---- answers of every kind, on an exercise made for it ------------------------------------------------------------------


class Pair(NamedTuple):
    mean: torch.Tensor
    counts: list[int]


def pair(x: torch.Tensor, words: list[str]) -> Pair:
    return Pair(x.mean(dim=0), [len(word) for word in words])


SWAPPED = Misconception("swapped", lambda x, words: tuple(reversed(pair(x, words))), "the two results are swapped")
PAIR = Exercise(
    name="pair",
    reference=pair,
    cases=lambda: [{"x": torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), "words": ["a", "red", "cube"]}],
    misconceptions=(SWAPPED,),
)


def changing(x, words):
    words.append("")
    return pair(x, words[:-1])


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (pair, Kind.RIGHT, "✓ pair: right in all 1 cases"),
        (lambda x, words: (x.mean(0), list(map(len, words))), Kind.RIGHT, "✓"),
        (lambda x, words: (list(map(len, words)), x.mean(0)), Kind.MISCONCEPTION, "the two results are swapped"),
        (lambda x, words: [x.mean(0), tuple(map(len, words))], Kind.RIGHT, "✓"),
        (lambda x, words: pair(x, words)._asdict(), Kind.WRONG_TYPE, "expected Pair(float32[2], [1, 3, 4]), got dict(['mean'] float32[2]"),
        (lambda x, words: pair(x, words)[:1], Kind.WRONG_SHAPE, "got tuple(float32[2]) for x=float32[2, 2], words=['a', 'red', 'cube']"),
        (lambda x, words: pair(x.double(), words), Kind.WRONG_TYPE, "in its part `[0]`: expected float32[2], got float64[2]"),
        (lambda x, words: pair(x[:, :1], words), Kind.WRONG_SHAPE, "in its part `[0]`: expected the shape [2], got [1]"),
        (lambda x, words: pair(x, words[:2]), Kind.WRONG_SHAPE, "in its part `[1]`: expected [1, 3, 4], got [1, 3]"),
        (lambda x, words: pair(x, [*words[:2], ""]), Kind.WRONG_VALUE, "in its part `[1]`: in its part `[2]`: expected 4, got 0"),
        (lambda x, words: pair(x.nan_to_num(), words), Kind.WRONG_VALUE, "in its part `[0]`: 0 of 2 numbers are NaN"),
        (lambda x, words: pair(x.nan_to_num_(), words), Kind.CHANGED_ITS_INPUT, "its input `x`"),
        (changing, Kind.CHANGED_ITS_INPUT, "its input `words`"),
        (lambda x, words: torch.empty(1, device="meta").item(), Kind.RAISED, "meta"),
    ],
)
def test_verdict_on_a_structure(answer, kind: Kind, said: str) -> None:
    verdict = judge(PAIR, answer)
    assert verdict.kind is kind, verdict.text
    assert said in verdict.text


def test_own_tolerance() -> None:
    def close(x, words):
        mean, counts = pair(x, words)
        return mean + 0.01, counts

    assert judge(PAIR, close).kind is Kind.WRONG_VALUE
    assert judge(dataclasses.replace(PAIR, tolerance=0.1), close).kind is Kind.RIGHT


def test_drawing_from_a_generator_does_not_count_as_changing_it() -> None:
    def draw(count, generator):
        return torch.randn(count, generator=generator)

    twice = Misconception("twice", lambda count, generator: 2 * torch.randn(count, generator=generator), "twice too large")
    cases = [{"count": count, "generator": torch.Generator().manual_seed(count)} for count in (3, 5)]
    exercise = Exercise("draw", draw, lambda: cases, (twice,))
    assert judge(exercise, draw).kind is Kind.RIGHT
    assert judge(exercise, lambda count, generator: torch.randn(count, generator=generator) * 2).kind is Kind.MISCONCEPTION


def test_hanging_answer_is_stopped() -> None:
    def hanging(x, words):
        while True:
            pass

    verdict = judge(dataclasses.replace(PAIR, seconds=0.1), hanging)
    assert verdict.kind is Kind.HANGING
    assert "it had not finished after 0.1 seconds for x=float32[2, 2]" in verdict.text


# ---- check --------------------------------------------------------------------------------------------------------------


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
