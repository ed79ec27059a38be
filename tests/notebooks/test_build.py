"""`notebooks/build.py`: what becomes of a source, and what it refuses to write."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks import build

LESSON = """# %% [markdown]
# # A lesson
# ![a red square](square.png)

# %%
import ipywidgets
from IPython.display import display

# %% tags=["nbval-check-output"]
print(6 * 7)

# %%
import sys
print("loading", file=sys.stderr)
slider = ipywidgets.IntSlider()
bundle = {"application/vnd.jupyter.widget-view+json": {"model_id": slider.model_id}, "image/png": "iVBORw0KGgo=", "text/plain": "a slider"}
display(bundle, metadata={"image/png": {"alt": "a still picture"}}, raw=True)

# %% tags=["exercise"]
def double(x):
    raise NotImplementedError

# %%
try:
    assert double(2) == 4
except NotImplementedError:
    print("not attempted yet")

# %% tags=["solution"]
def double(x):
    return 2 * x
"""


def write_source(folder: Path, text: str) -> Path:
    source = folder / "src" / "00_small.py"
    source.parent.mkdir(exist_ok=True)
    source.write_text(text, encoding="utf-8")
    return source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path, LESSON)


def test_ids_and_metadata_are_stable(source: Path) -> None:
    notebook = build.read_source(source)
    assert [cell.id for cell in notebook.cells] == [f"00_small-{number:03}" for number in range(7)]
    assert notebook.metadata.flux_lab.source_sha256 == build.source_hash(source)
    assert "version" not in notebook.metadata.language_info


def test_solution_is_folded_for_the_learner(source: Path) -> None:
    stub, _, solution = build.fold_solutions(build.read_source(source)).cells[4:]
    assert "NotImplementedError" in stub.source
    assert solution.cell_type == "markdown"
    assert solution.source.startswith("<details><summary>")
    assert "```python\ndef double(x):\n    return 2 * x\n```" in solution.source


def test_solution_replaces_the_stub_for_the_tests(source: Path) -> None:
    solved = build.apply_solutions(build.read_source(source)).cells
    assert len(solved) == 6
    assert solved[4].source == "def double(x):\n    return 2 * x"


def test_solution_without_exercise_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path, '# %% tags=["solution"]\n1\n')
    with pytest.raises(ValueError, match=r"00_small\.py: cell 0 is tagged `solution`"):
        build.read_source(source)


@pytest.mark.slow
def test_build_is_clean_and_the_same_twice(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = build.build(source)
    build.write(notebook, build.target(source))
    first = build.target(source).read_bytes()
    widget, stub = notebook.cells[3], notebook.cells[4]
    assert notebook.cells[2].outputs[0].text == "42\n"
    assert stub.outputs == []
    assert [list(output.data) for output in widget.outputs] == [["image/png", "text/plain"]]
    assert widget.outputs[0].metadata.widget
    assert "loading" in capsys.readouterr().err
    assert "widgets" not in notebook.metadata
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    build.write(build.build(source), build.target(source))
    assert build.target(source).read_bytes() == first
    assert sorted(os.listdir(source.parent.parent)) == ["00_small.ipynb", "src"]


def test_stale_after_an_edit_but_not_after_new_line_ends(source: Path) -> None:
    assert build.is_stale(source)
    build.write(build.read_source(source), build.target(source))
    assert not build.is_stale(source)
    source.write_bytes(LESSON.replace("\n", "\r\n").encode())
    assert not build.is_stale(source)
    source.write_text(LESSON + "\n# more\n")
    assert build.is_stale(source)


def test_failing_lesson_leaves_the_old_notebook(tmp_path: Path) -> None:
    source = write_source(tmp_path, "# %%\n1 / 0\n")
    build.target(source).write_text("old")
    assert build.build_all([source], force=True) == 1
    assert build.target(source).read_text() == "old"
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        build.build(source)


def printing(text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", name="stdout", text=text)])


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        (nbformat.v4.new_markdown_cell("![](a.png)"), "a markdown picture without alt text: a.png"),
        (nbformat.v4.new_markdown_cell('<img src="a.png" alt="">'), "an <img> without alt text"),
        (
            nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", {"image/png": "AA=="})]),
            "a picture (image/png) without",
        ),
        (
            nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", {"text/html": "<IMG src='a'>"})]),
            "an <img> without alt",
        ),
        (
            nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})]),
            "a widget without a still picture",
        ),
        (
            nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("error", ename="KeyError", evalue="'q'")]),
            "it stopped with KeyError: 'q'",
        ),
        (printing("read from /home/ada/flux/a.json"), "it shows /home/ada/flux/a.json, which is of this machine only"),
        (printing(f"read from {build.NOTEBOOKS}/a.json"), f"it shows {build.NOTEBOOKS.parent}, which"),
        (printing(r"read from C:\Users\Ada\a.json"), r"it shows C:\Users\Ada\a.json, which"),
        (printing("<function f at 0x7f3a6c0d5e10>"), "it shows at 0x7f3a6c0d5e10, which"),
        (nbformat.v4.new_markdown_cell("x" * 600_000), "the limit is 600,000"),
    ],
)
def test_problem_is_named(cell: nbformat.NotebookNode, problem: str) -> None:
    found = build.problems(nbformat.v4.new_notebook(cells=[cell]))
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    "text",
    ["![a cat](a.png)", '<img src="a.png" title="1 > 0" alt="a cat">', "write `![](a.png)`", '```\n<img src="a.png">\n```', "no picture"],
)
def test_good_markdown_is_no_problem(text: str) -> None:
    assert build.problems(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])) == []


@pytest.mark.parametrize("text", ["../data/flux-mini", "a/b", "and/or", "1/2 /3", "https://a.org/home/x", "data/tmp/x", "0x7f"])
def test_relative_path_is_no_problem(text: str) -> None:
    assert build.problems(nbformat.v4.new_notebook(cells=[printing(text)])) == []


def test_check_names_the_stale_and_the_orphaned(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build, "NOTEBOOKS", source.parent.parent)
    (source.parent.parent / "01_orphan.ipynb").write_text("{}")
    assert build.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "00_small.ipynb is older than src/00_small.py" in said
    assert "01_orphan.ipynb has no source" in said


def test_solutions_command_writes_elsewhere(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "NOTEBOOKS", source.parent.parent)
    assert build.main(["--solutions", "--out", str(tmp_path / "solved")]) == 0
    solved = nbformat.read(tmp_path / "solved" / "00_small.ipynb", as_version=4)
    assert "return 2 * x" in solved.cells[4].source
    assert not build.target(source).exists()
