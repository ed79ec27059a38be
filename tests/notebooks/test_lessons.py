"""The committed notebooks: as new as their sources, complete, readable without a kernel, and solvable."""

from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

from notebooks import build

# With this set, `flux_lab.exercises.check` raises where it would print that an answer is missing or wrong.
STRICT = {"FLUX_LAB_STRICT": "1"}

SOURCES = build.sources()
LESSONS = pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
BUILT = [source for source in SOURCES if build.target(source).exists()]
NOTEBOOKS = pytest.mark.parametrize("source", BUILT, ids=[source.stem for source in BUILT])
WITH_EXERCISES = [source for source in SOURCES if any(build.has_tag(cell, "exercise") for cell in build.read_source(source).cells)]
EXERCISES = pytest.mark.parametrize("source", WITH_EXERCISES, ids=[source.stem for source in WITH_EXERCISES])


def committed(source: Path) -> nbformat.NotebookNode:
    return nbformat.read(build.target(source), as_version=4)


def test_every_notebook_has_a_source() -> None:
    assert {path.stem for path in build.NOTEBOOKS.glob("*.ipynb")} <= {source.stem for source in SOURCES}


@LESSONS
def test_notebook_is_as_new_as_its_source(source: Path) -> None:
    assert not build.is_stale(source), f"src/{source.name} was edited: run `make notebooks`"


@NOTEBOOKS
def test_notebook_keeps_the_rules(source: Path) -> None:
    assert build.problems(committed(source)) == []


@NOTEBOOKS
def test_notebook_was_run_from_top_to_bottom(source: Path) -> None:
    counts = [cell.execution_count for cell in committed(source).cells if cell.cell_type == "code" and cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))


@NOTEBOOKS
def test_every_widget_is_a_picture_in_html(source: Path) -> None:
    notebook = committed(source)
    page = BeautifulSoup(HTMLExporter().from_notebook_node(notebook)[0], "html.parser")
    widgets = [cell for cell in notebook.cells for output in cell.get("outputs", []) if output.get("metadata", {}).get("widget")]
    for cell in widgets:
        picture = page.find(id=f"cell-id={cell.id}").find("img", src=lambda src: src and src.startswith("data:image"))
        assert picture is not None, cell.id
        assert picture["alt"].strip(), cell.id


@pytest.mark.slow
@EXERCISES
def test_solutions_pass(source: Path) -> None:
    build.execute(build.apply_solutions(build.read_source(source)), build.NOTEBOOKS, **STRICT)


@pytest.mark.slow
@EXERCISES
def test_every_blank_stub_fails(source: Path) -> None:
    notebook = build.execute(build.fold_solutions(build.read_source(source)), build.NOTEBOOKS, allow_errors=True, **STRICT)
    stubs = [cell for cell in notebook.cells if build.has_tag(cell, "exercise")]
    failed = [cell for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert len(failed) >= len(stubs)
