"""A workshop: many kernels on one machine, and answers that hang."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from notebooks import build

HANGING = """
import dataclasses
from flux_lab.exercises import EXERCISES, judge

def image_tokens(height, width):
    while True:
        pass

print(judge(dataclasses.replace(EXERCISES["image_tokens"], seconds=0.5), image_tokens).kind.value)
"""


@pytest.mark.slow
def test_two_lessons_run_at_the_same_time() -> None:
    """Both kernels load the same checkpoint; each prints the numbers that it prints alone."""
    lessons = [source for source in build.sources() if source.stem in ("03_latents_and_packing", "11_vae")]  # quick ones
    notebooks = [build.fold_solutions(build.read_source(source)) for source in lessons]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda notebook: build.execute(notebook, build.NOTEBOOKS), notebooks))
    for source, notebook in zip(lessons, together, strict=True):
        alone = nbformat.read(build.target(source), as_version=4)
        assert key_numbers(notebook) == key_numbers(alone)


def key_numbers(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """What every cell tagged `nbval-check-output` printed."""
    tagged = [cell for cell in build.code_cells(notebook) if build.has_tag(cell, "nbval-check-output")]
    return {cell.id: "".join(output.text for output in cell.outputs if output.get("name") == "stdout") for cell in tagged}


@pytest.mark.slow
def test_hanging_answer_leaves_the_kernel_alive(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(code) for code in (HANGING, "print(6 * 7)")]
    notebook = build.execute(nbformat.v4.new_notebook(cells=cells), tmp_path)
    assert [cell.outputs[0].text for cell in notebook.cells] == ["hanging\n", "42\n"]
