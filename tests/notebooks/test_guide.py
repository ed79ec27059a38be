"""The guide for those who teach agrees with the lessons."""

import re

import pytest

from flux_lab.exercises import COURSE
from notebooks import build

GUIDE = (build.NOTEBOOKS / "README.md").read_text(encoding="utf-8")
SOURCES = {source.stem: source for source in build.sources()}


@pytest.mark.parametrize("stem", [f"{number:02}_{stem}" for number, stem in enumerate(COURSE)])
def test_lesson_has_its_minutes_and_questions(stem: str) -> None:
    (row,) = re.findall(rf"^\| \[?{stem[:2]} .*$", GUIDE, flags=re.M)
    _, _, rest = GUIDE.partition(f"\n### {stem[:2]} ")
    section = rest.partition("\n### ")[0]
    if stem not in SOURCES:
        assert "not written yet" in row
        assert "Not written yet." in section
        return
    (minutes,) = re.findall(r"(\d+) minutes to\s+study", build.read_source(SOURCES[stem]).cells[0].source)
    assert re.fullmatch(rf"\| \[[^]]+\]\({stem}\.ipynb\) \| {minutes} \| .*\|", row.replace("| |", "|  |"))
    assert "Stuck: " in section
    assert len(re.findall(r"^- .+\? \*.+\*$", section, flags=re.M)) >= 3
    assert "ot written yet" not in section
