"""Every lesson as a learner meets it: opened in JupyterLab, run, every control moved, its hints and solutions unfolded."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import lab
import nbformat
import pytest
from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
SCREENSHOTS = ROOT / "outputs" / "screenshots"

WIDGET = """
from PIL import Image
from flux_lab.instruments import explore
def draw(level=9, share=0.5, word="red", text="hello", flag=False, dead=5):
    if word == "none":
        raise ValueError("no such colour")
    return Image.new("RGB", (60, 40), (level * 20, round(share * 100) + 6 * len(text), 40 * len(word) + 60 * flag))
"""
GOOD = """
explore(draw, alt="a rectangle", level=(0, 9), share=(0.0, 1.0, 0.25), word=["green", "red"], text=str, flag=bool)
"""
BAD = 'explore(draw, alt="a rectangle", level=(0, 9), dead=(0, 9), word=["red", "none"])'
FOLDED = "<details><summary>Solution</summary>\n\n```python\nanswer = 42\n```\n\n</details>"
SAMPLES = {"good.ipynb": [WIDGET, GOOD], "bad_controls.ipynb": [WIDGET, BAD], "failing.ipynb": ["1", "1 / 0"]}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        lab.chromium() is None and not os.environ.get("CI"), reason="Chromium is not installed (Debian: apt install chromium)"
    ),
]


def write_samples(folder: Path) -> None:
    """Three small notebooks that show what the checks below can see."""
    for name, sources in SAMPLES.items():
        cells = [nbformat.v4.new_markdown_cell(FOLDED), *map(nbformat.v4.new_code_cell, sources)]
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / name)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert lab.chromium(), "Chromium must be there on CI"
    folder = tmp_path_factory.mktemp("notebooks")
    for name in NOTEBOOKS:
        shutil.copy(ROOT / "notebooks" / name, folder)
    write_samples(folder)
    with lab.serve(folder, home=tmp_path_factory.mktemp("jupyter")) as address:
        yield address


@pytest.fixture(scope="module")
def page(url: str) -> Iterator[Page]:
    """One JupyterLab for all lessons, which are opened and closed in it one after the other."""
    with lab.browse() as browser, lab.open_lab(browser, url) as page:
        yield page


@pytest.mark.parametrize("name", ["good.ipynb", *NOTEBOOKS])
def test_lesson_works_in_jupyterlab(page: Page, name: str) -> None:
    with lab.open_lesson(page, name) as lesson:
        outputs = lesson.run_all()
        lesson.screenshot(SCREENSHOTS / f"{Path(name).stem}.png")
        assert lab.errors(outputs) == []
        controls, folded = lesson.controls(), lesson.folded()
        assert controls
        assert [fault for control in controls if (fault := lesson.move(control))] == []
        if name == "good.ipynb":
            assert (len(controls), len(folded)) == (5, 1)
        for hint_or_solution in folded:
            content = hint_or_solution.locator("> :not(summary)").first
            assert content.is_hidden()
            hint_or_solution.locator("summary").click()
            assert content.is_visible()


def test_error_in_a_cell_is_seen(page: Page) -> None:
    with lab.open_lesson(page, "failing.ipynb") as lesson:
        assert lab.errors(lesson.run_all()) == ["cell 2: ZeroDivisionError: division by zero"]


def test_control_without_effect_or_with_an_error_is_seen(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "CHANGE_SECONDS", 10)
    with lab.open_lesson(page, "bad_controls.ipynb") as lesson:
        assert lab.errors(lesson.run_all()) == []
        faults = [lesson.move(control) for control in lesson.controls()]
        assert faults == [None, "dead: the picture did not change", "word: ValueError: no such colour"]
