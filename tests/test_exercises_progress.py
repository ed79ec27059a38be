"""The progress file: what is recorded and what is not, that nothing is lost, and that a broken file stops nobody."""

import json
import os
import sys
from pathlib import Path

import pytest

from flux_lab import exercises
from flux_lab.exercises import EXERCISES, LESSONS, check
from flux_lab.exercises.progress import Entry, lines, progress_file, read, set_aside, summary, write

RIGHT = EXERCISES["image_tokens"].reference


def wrong(height, width):
    return 5


def stub(height, width):
    raise NotImplementedError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FLUX_LAB_STRICT", raising=False)
    monkeypatch.setenv("FLUX_LAB_PROGRESS", str(tmp_path / "mine" / "progress.json"))
    return tmp_path / "mine" / "progress.json"


def test_attempts_are_counted_up_to_the_first_right_answer(file: Path) -> None:
    check("image_tokens", stub)
    assert not file.exists()
    check("image_tokens", wrong)
    check("image_tokens", 3)
    assert read(file) == {"image_tokens": Entry(attempts=2)}
    check("image_tokens", RIGHT)
    solved = read(file)["image_tokens"]
    assert solved.attempts == 3
    assert solved.solved.endswith("+00:00")
    check("image_tokens", wrong)
    check("image_tokens", RIGHT)
    check("euler_step", wrong)
    assert read(file) == {"image_tokens": solved, "euler_step": Entry(attempts=1)}
    assert os.listdir(file.parent) == [file.name]


def test_prepared_solutions_are_not_recorded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_LAB_STRICT", "1")
    check("image_tokens", RIGHT)
    assert not file.exists()


def test_nothing_is_kept_where_the_variable_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_LAB_PROGRESS", "")
    assert progress_file() is None
    check("image_tokens", RIGHT)


def test_these_tests_keep_away_from_the_users_file() -> None:
    assert os.environ["FLUX_LAB_PROGRESS"] == ""


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", None, "home/.local/share"),
        ("linux", "XDG_DATA_HOME", "elsewhere"),
        ("darwin", None, "home/Library/Application Support"),
        ("win32", None, "home/AppData/Local"),
        ("win32", "LOCALAPPDATA", "elsewhere"),
    ],
)
def test_place(platform: str, variable: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLUX_LAB_PROGRESS", "XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert progress_file() == tmp_path / expected / "flux-lab" / "progress.json"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"exercises": []}', b'{"exercises": {"a": 3}}', b"[" * 100_000),
        b'{"exercises": {"a": {"attempts": "3"}}}',
        *(b'{"exercises": {"a": {"solved": %s}}}' % solved for solved in (b'"yes"', b'""', b"true")),
    ],
)
def test_broken_file_is_kept_aside(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"progress\.json is not a progress file .* It was renamed to progress\.json\.broken"):
        check("image_tokens", wrong)
    assert (file.parent / "progress.json.broken").read_bytes() == content
    assert read(file) == {"image_tokens": Entry(attempts=1)}


def test_byte_order_mark_is_no_fault(file: Path) -> None:
    write(file, {"euler_step": Entry(2)})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read(file) == {"euler_step": Entry(2)}


def test_a_second_broken_file_does_not_replace_the_first(file: Path) -> None:
    file.parent.mkdir()
    for number, name in enumerate(["progress.json.broken", "progress.json.broken2", "progress.json.broken3"]):
        file.write_text(str(number))
        assert set_aside(file, "broken").name == name
        assert (file.parent / name).read_text() == str(number)


def test_place_that_cannot_be_written_is_a_warning(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.parent.write_text("a file where a folder is needed")
    with pytest.warns(UserWarning, match="progress is not kept: "):
        check("image_tokens", RIGHT)
    assert capsys.readouterr().out.startswith("✓ image_tokens")


def test_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check("image_tokens", wrong)
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.warns(UserWarning, match="progress is not kept: disk full"):
        check("image_tokens", wrong)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_entries_of_another_version_of_the_course_are_kept(file: Path) -> None:
    write(file, {"an_old_exercise": Entry(2, "2020-01-01T00:00:00+00:00")})
    check("image_tokens", wrong)
    assert set(read(file)) == {"an_old_exercise", "image_tokens"}
    assert summary(LESSONS, read(file))["solved"] == 0


def test_summary_and_its_lines() -> None:
    lessons = {"00_welcome": LESSONS["00_welcome"], "04_rope": ()}
    made = summary(lessons, {"image_tokens": Entry(1, "2020-01-02T12:00:00+00:00"), "euler_step": Entry(2)})
    assert made == {
        "solved": 1,
        "exercises": 2,
        "lessons": {
            "00_welcome": {
                "image_tokens": {"attempts": 1, "solved": "2020-01-02T12:00:00+00:00"},
                "euler_step": {"attempts": 2, "solved": None},
            },
            "04_rope": {},
        },
    }
    assert json.loads(json.dumps(made)) == made
    text = lines(made)
    assert text[0] == "00 welcome: 1 of 2"
    assert text[1].startswith("  [x] image_tokens  2020-01-0")
    assert text[1].endswith(", 1 attempt")
    assert text[2:] == ["  [ ] euler_step    2 attempts", "04 rope: 0 of 0", "1 of 2 exercises solved"]
    assert lines(summary(exercises.LESSONS, {}))[-1] == f"0 of {len(EXERCISES)} exercises solved"
