"""The committed notebooks: as new as their sources, complete, of one form, readable without a kernel, and solvable."""

import ast
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

from flux_lab.exercises import COURSE
from flux_lab.exercises import LESSONS as EXERCISES_OF
from notebooks import build

# With this set, `flux_lab.exercises.check` raises where it would print that an answer is missing or wrong.
STRICT = {"FLUX_LAB_STRICT": "1"}

# The headings of every lesson after its title, in this order; others may stand between them.
SECTIONS = [
    *["You are here", "The idea", "The real code", "Shapes", "Trust, then verify", "Turn the knob", "Break it", "Common misreadings"],
    *["Your turn", "Recap"],
]
CELL_LINES = 15

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


def test_lessons_are_those_of_the_course() -> None:
    assert {source.stem for source in SOURCES} <= {f"{number:02}_{stem}" for number, stem in enumerate(COURSE)}


# ---- the form -----------------------------------------------------------------------------------------------------------


def markdown(cells: list[nbformat.NotebookNode]) -> str:
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def exercise_parts(source: Path) -> Iterator[list[nbformat.NotebookNode]]:
    """The cells of every exercise: its stub and what follows, up to the next stub."""
    cells = build.read_source(source).cells
    starts = [number for number, cell in enumerate(cells) if build.has_tag(cell, "exercise")]
    return (cells[start:end] for start, end in zip(starts, [*starts[1:], len(cells)], strict=True))


@LESSONS
def test_title_says_what_for_how_long_and_for_whom(source: Path) -> None:
    title = build.read_source(source).cells[0].source
    assert title.startswith(f"# {source.stem[:2]} · ")
    assert "After this lesson you can" in title
    assert len(re.findall(r"^- ", title, flags=re.M)) == 3
    assert "**Time**: " in title
    assert "**You need**: " in title


@LESSONS
def test_every_section_is_there_in_order(source: Path) -> None:
    headings = re.findall(r"^## (.+)$", markdown(build.read_source(source).cells), flags=re.M)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS


@LESSONS
def test_recap_has_five_lines_and_the_next_step(source: Path) -> None:
    recap = markdown(build.read_source(source).cells).rpartition("## Recap")[2]
    assert re.findall(r"^(\d)\. ", recap, flags=re.M) == ["1", "2", "3", "4", "5"]
    assert "**Next**" in recap


@LESSONS
def test_every_exercise_can_be_checked_has_hints_and_a_solution(source: Path) -> None:
    parts = list(exercise_parts(source))
    assert len(parts) >= 2
    for stub, *rest in parts:
        assert re.search(r"^ +raise NotImplementedError$", stub.source, flags=re.M), stub.source
        assert sum(build.has_tag(cell, "solution") and cell.cell_type == "code" for cell in rest) == 1, stub.source
        assert "<details><summary>Hint 1</summary>" in markdown(rest), stub.source
        assert any(re.search(r"^check\(", cell.source, flags=re.M) for cell in rest), stub.source


@LESSONS
def test_exercises_are_those_of_the_lessons_module(source: Path) -> None:
    code = "\n".join(cell.source for cell in build.read_source(source).cells if cell.cell_type == "code")
    assert sorted(re.findall(r'^check\("(\w+)"', code, flags=re.M)) == sorted(exercise.name for exercise in EXERCISES_OF[source.stem])


def code_lines(source: str) -> list[str]:
    """The lines that count: neither blank ones and comments, nor imports, brackets that close, and lines of nothing but text."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {number for node in imports for number in range(node.lineno, node.end_lineno + 1)}
    other = re.compile(r"""\s*(#.*|[])},]*|(alt=)?f?"[^"]*"[])},]*)""")
    lines = enumerate(source.splitlines(), start=1)
    return [line for number, line in lines if number not in imported and not other.fullmatch(line)]


@LESSONS
def test_cells_are_short(source: Path) -> None:
    for cell in build.code_cells(build.read_source(source)):
        lines = code_lines(cell.source)
        assert len(lines) <= CELL_LINES or build.has_tag(cell, "solution"), f"{len(lines)} lines:\n{cell.source}"


@NOTEBOOKS
def test_there_is_something_to_look_at(source: Path) -> None:
    outputs = [output for cell in build.code_cells(committed(source)) for output in cell.outputs]
    assert sum(any(picture in output.get("data", {}) for picture in build.PICTURES) for output in outputs) >= 4
    assert sum(bool(output.get("metadata", {}).get("widget")) for output in outputs) >= 1


@NOTEBOOKS
def test_key_numbers_are_compared(source: Path) -> None:
    compared = [cell for cell in build.code_cells(committed(source)) if build.has_tag(cell, "nbval-check-output")]
    assert compared
    for cell in compared:
        assert any(output.output_type in ("stream", "execute_result") for output in cell.outputs), cell.source


# ---- the files ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@NOTEBOOKS
def test_every_widget_is_a_picture_in_html(source: Path) -> None:
    notebook = committed(source)
    page = BeautifulSoup(HTMLExporter().from_notebook_node(notebook)[0], "html.parser")
    widgets = [cell for cell in notebook.cells for output in cell.get("outputs", []) if output.get("metadata", {}).get("widget")]
    for cell in widgets:
        picture = page.find(id=f"cell-id={cell.id}").find("img", src=lambda src: src and src.startswith("data:image"))
        assert picture is not None, cell.id
        assert picture["alt"].strip(), cell.id


def root(node: ast.AST) -> str | None:
    """The name that `name.part[0].more` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call | ast.Starred):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def names_in(code: str) -> tuple[set[str], set[str]]:
    """The names that a cell reads, and those that it makes or may change: `x = 1`, `x.y = 1`, `x.change()`."""
    tree, cell = ast.parse(code), symtable.symtable(code, "cell", "exec")
    made = {symbol.get_name() for symbol in cell.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    reads, tables = set(), [cell]
    for table in tables:  # the cell, then its functions and comprehensions
        reads |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and (table is cell or symbol.is_global())}
        tables += table.get_children()
    # What a loop at the top names, it gives a value itself.
    reads -= {node.id for loop in tree.body if isinstance(loop, ast.For) for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
    parts = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store)]
    calls = [line.value for line in tree.body if isinstance(line, ast.Expr) and isinstance(line.value, ast.Call)]
    return reads, made | {root(part) for part in parts} | {root(call.func) for call in calls if isinstance(call.func, ast.Attribute)}


def what_is_needed(cells: list[nbformat.NotebookNode], later: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Those of `cells` that make or change what `later` ones, or other needed ones, read: to run a whole lesson takes much longer."""
    names = {cell.id: names_in(cell.source) for cell in cells if cell.cell_type == "code"}
    wanted, before = set().union(*(names_in(cell.source)[0] for cell in later)), set()
    while wanted != before:
        before = set(wanted)
        wanted |= set().union(*(reads for reads, changes in names.values() if changes & wanted))
    return [cell for cell in cells if cell.id in names and names[cell.id][1] & wanted]


def test_what_is_needed_is_found():
    codes = ["import torch, os", "x = torch.ones(3)", "print(x)", "y = 5", "x[0] = os.cpu_count()", "def f():\n    return y", "y.sort()"]
    cells = [nbformat.v4.new_code_cell(code) for code in codes]
    for later, expected in (("x", [0, 1, 4]), ("print(x)", [0, 1, 4]), ("f()", [3, 5, 6]), ("z", [])):
        found = what_is_needed(cells, [nbformat.v4.new_code_cell(later)])
        assert [codes.index(cell.source) for cell in found] == expected


def tried_twice(source: Path) -> nbformat.NotebookNode:
    """The lesson's exercises, each gone through twice: cells tagged `blank` as it is handed out, then `solved` ones."""
    notebook = build.read_source(source)
    start = next(number for number, cell in enumerate(notebook.cells) if build.has_tag(cell, "exercise"))
    cells = []
    for part in exercise_parts(source):
        code = [cell for cell in part if cell.cell_type == "code"]
        solutions = [cell for cell in code if build.has_tag(cell, "solution")]
        blank = [cell for cell in code if cell not in solutions]
        for tag, tried in (("blank", blank), ("solved", [*solutions, *blank[1:]])):
            cells += [nbformat.v4.new_code_cell(cell.source, metadata={"tags": [tag]}) for cell in tried]
    notebook.cells = what_is_needed(notebook.cells[:start], cells) + cells
    return notebook


@pytest.mark.slow
@EXERCISES
def test_blank_stubs_fail_and_solutions_pass(source: Path) -> None:
    notebook = build.execute(tried_twice(source), build.NOTEBOOKS, allow_errors=True, **STRICT)
    failed = [cell for cell in build.code_cells(notebook) if any(output.output_type == "error" for output in cell.outputs)]
    assert [cell.source for cell in failed if not build.has_tag(cell, "blank")] == []
    assert len(failed) >= len(list(exercise_parts(source)))
    assert not [output.evalue for cell in failed for output in cell.outputs if output.get("ename") == "NameError"]
