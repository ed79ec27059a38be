"""Every lesson as a learner meets it: opened in JupyterLab, run, its sliders moved, its hints and solutions unfolded."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import lab
import nbformat
import pytest
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
SCREENSHOTS = ROOT / "outputs" / "screenshots"

WIDGET = """
import io, ipywidgets, PIL.Image
def picture(value):
    PIL.Image.new("RGB", (60, 40), (value * 40, 80, 120)).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()
slider = ipywidgets.IntSlider(value=5, max=5)
image = ipywidgets.Image(value=picture(5), width=60)
"""
LINK = "slider.observe(lambda change: setattr(image, 'value', picture(change.new)), 'value')"
SHOW = "ipywidgets.VBox([slider, image])"
FOLDED = "<details><summary>Solution</summary>\n\n```python\nanswer = 42\n```\n\n</details>"
SAMPLES = {"good.ipynb": [WIDGET, LINK, SHOW], "dead_slider.ipynb": [WIDGET, SHOW], "failing.ipynb": ["1", "1 / 0"]}

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


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright, lab.browse(playwright) as page:
        yield page


@pytest.mark.parametrize("name", ["good.ipynb", *NOTEBOOKS])
def test_lesson_works_in_jupyterlab(page: Page, url: str, name: str) -> None:
    with lab.open_lesson(page, url, name) as lesson:
        outputs = lesson.run_all()
        lesson.screenshot(SCREENSHOTS / f"{Path(name).stem}.png")
        assert lab.errors(outputs) == []
        sliders, folded = lesson.sliders(), lesson.folded()
        if name == "good.ipynb":
            assert (len(sliders), len(folded)) == (1, 1)
        for number, slider in enumerate(sliders):
            assert lesson.move(slider), f"slider {number} changes no picture"
        for hint_or_solution in folded:
            content = hint_or_solution.locator("> :not(summary)").first
            assert content.is_hidden()
            hint_or_solution.locator("summary").click()
            assert content.is_visible()


def test_error_in_a_cell_is_seen(page: Page, url: str) -> None:
    with lab.open_lesson(page, url, "failing.ipynb") as lesson:
        assert lab.errors(lesson.run_all()) == ["cell 2: ZeroDivisionError: division by zero"]


def test_slider_without_effect_is_seen(page: Page, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "CHANGE_SECONDS", 2)
    with lab.open_lesson(page, url, "dead_slider.ipynb") as lesson:
        assert lab.errors(lesson.run_all()) == []
        (slider,) = lesson.sliders()
        assert not lesson.move(slider)
