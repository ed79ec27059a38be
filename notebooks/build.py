"""Build and run the lessons: `notebooks/src/NN_name.py` becomes `notebooks/NN_name.ipynb`.

    python notebooks/build.py                        build what is older than its source
    python notebooks/build.py 04_rope --force        build this lesson in any case
    python notebooks/build.py --check                name the notebooks that are older than their source, exit code 1 if any
    python notebooks/build.py --solutions --out DIR  the solved lessons, not run: each solution stands where its stub stood

A source is in jupytext's percent format. Of an `exercise` cell the learner gets the stub; the `solution` cell that follows it becomes a
collapsed block of text.
"""

import argparse
import copy
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parent
SIZE_LIMIT = 600_000
CELL_TIMEOUT = 600
WIDGET = "application/vnd.jupyter.widget-view+json"
# What tells on the machine that ran a lesson: folders outside the project, and addresses in its memory.
OF_THE_MACHINE = re.compile(
    r"(?<![\w.~/])/(?:home|root|Users|tmp|var|opt|usr|mnt|private)/[^\s'\"]+|\b[A-Z]:\\\\?(?:Users|Temp)\\[^\s'\"]+|\bat 0x[0-9a-f]{6,}"
)
PICTURES = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/svg+xml")
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}


def sources() -> list[Path]:
    """The lessons' sources, in the order of the course."""
    return sorted((NOTEBOOKS / "src").glob("[0-9][0-9]_*.py"))


def target(source: Path) -> Path:
    """The notebook that a source is built into."""
    return source.parent.parent / f"{source.stem}.ipynb"


def source_hash(source: Path) -> str:
    """SHA-256 of the source's text, the same whatever line ends it was checked out with."""
    return hashlib.sha256(source.read_text(encoding="utf-8").encode()).hexdigest()


def is_stale(source: Path) -> bool:
    """Whether the notebook is missing or was built from another text than the source now holds."""
    path = target(source)
    if not path.exists():
        return True
    built_from = nbformat.read(path, as_version=4).metadata.get("flux_lab", {}).get("source_sha256")
    return built_from != source_hash(source)


# ---- from source to cells -----------------------------------------------------------------------------------------------


def has_tag(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def read_source(source: Path) -> NotebookNode:
    """The source as a notebook: stable cell ids, fixed metadata, tags kept. Raises ValueError for a solution without an exercise."""
    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {**METADATA, "flux_lab": {"source_sha256": source_hash(source)}}
    )
    exercise_seen = False
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        cell.id = f"{re.sub('[^a-zA-Z0-9_-]', '-', source.stem)}-{number:03}"
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        exercise_seen |= has_tag(cell, "exercise")
        if has_tag(cell, "solution") and not exercise_seen:
            raise ValueError(
                f"{source.name}: cell {number} is tagged `solution`, but no cell before it is tagged `exercise`"
            )
    return notebook


def fold_solutions(notebook: NotebookNode) -> NotebookNode:
    """What a learner gets: every solution as a collapsed block of markdown."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [
        folded(cell) if has_tag(cell, "solution") else cell for cell in notebook.cells
    ]
    return notebook


def folded(cell: NotebookNode) -> NotebookNode:
    body = f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source
    text = f"<details><summary><b>Solution</b></summary>\n\n{body}\n\n</details>"
    return nbformat.v4.new_markdown_cell(text, id=cell.id, metadata=cell.metadata)


def apply_solutions(notebook: NotebookNode) -> NotebookNode:
    """What the tests run: every solution's code in the place of the stub before it."""
    notebook = copy.deepcopy(notebook)
    solved, stub = [], None
    for cell in notebook.cells:
        if not has_tag(cell, "solution"):
            stub = cell if has_tag(cell, "exercise") else stub
            solved.append(cell)
        elif cell.cell_type == "code":
            stub.source = (
                cell.source if has_tag(stub, "exercise") else f"{stub.source}\n\n\n{cell.source}"
            )
            stub.metadata.tags = [tag for tag in stub.metadata.tags if tag != "exercise"]
    notebook.cells = solved
    return notebook


# ---- running and cleaning -----------------------------------------------------------------------------------------------


def execute(
    notebook: NotebookNode, folder: Path, allow_errors: bool = False, **environment: str
) -> NotebookNode:
    """Run every cell in a fresh kernel that works in `folder`. Raises CellExecutionError, unless errors are allowed.

    No progress is recorded, unless `environment` says where.
    """
    settings = {"timeout": CELL_TIMEOUT, "kernel_name": "python3", "allow_errors": allow_errors}
    settings |= {
        "record_timing": False,
        "coalesce_streams": True,
    }  # whatever the time took, the notebook is the same
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **settings)
    return client.execute(
        env={**os.environ, "PYTHONHASHSEED": "0", "FLUX_LAB_PROGRESS": "", **environment}
    )


def clean(notebook: NotebookNode) -> list[str]:
    """Keep only what is the same at every build and readable without a kernel; return the lines of stderr that were dropped.

    A widget's output holds its view and a still picture of its defaults. The view needs a running kernel, so the picture stays alone,
    marked `widget` in the output's metadata.
    """
    dropped = []
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = nbformat.from_dict(METADATA["language_info"])
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)
        dropped += [output.text for output in cell.outputs if output.get("name") == "stderr"]
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            if WIDGET in data and any(picture in data for picture in PICTURES):
                del data[WIDGET]
                output.metadata.widget = True
    return dropped


def code_cells(notebook: NotebookNode) -> Iterator[NotebookNode]:
    return (cell for cell in notebook.cells if cell.cell_type == "code")


# ---- what a committed notebook must keep to -----------------------------------------------------------------------------


def problems(notebook: NotebookNode) -> list[str]:
    """Everything that must not be committed: errors, paths of one machine, pictures without alt text, widgets without a picture, size."""
    found = []
    if (size := len(nbformat.writes(notebook).encode())) > SIZE_LIMIT:
        found.append(f"the notebook has {size:,} bytes; the limit is {SIZE_LIMIT:,}")
    for cell in notebook.cells:
        found += [f"cell {cell.id}: {problem}" for problem in cell_problems(cell)]
    return found


def cell_problems(cell: NotebookNode) -> Iterator[str]:
    if cell.cell_type == "markdown":
        yield from pictures_without_alt(cell.source)
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            yield f"it stopped with {output.ename}: {output.evalue}"
        data, metadata = output.get("data", {}), output.get("metadata", {})
        for text in (
            output.get("text", ""),
            *(data.get(f"text/{form}", "") for form in ("plain", "html", "markdown")),
        ):
            yield from (
                f"it shows {trace}, which is of this machine only"
                for trace in traces_of_the_machine(text)
            )
        if WIDGET in data:
            yield "a widget without a still picture: publish the widget's view and a PNG in one display call"
        for picture in PICTURES:
            if picture in data and not str(metadata.get(picture, {}).get("alt", "")).strip():
                yield f'a picture ({picture}) without metadata {{"{picture}": {{"alt": ...}}}}'
        yield from pictures_without_alt(data.get("text/html", ""))
        yield from pictures_without_alt(data.get("text/markdown", ""))


def traces_of_the_machine(text: str) -> list[str]:
    """Absolute paths and memory addresses in what a cell printed."""
    project = [str(NOTEBOOKS.parent)] if str(NOTEBOOKS.parent) in text else []
    return project + OF_THE_MACHINE.findall(text.replace(str(NOTEBOOKS.parent), ""))


def pictures_without_alt(text: str) -> Iterator[str]:
    """Markdown images and <img> tags, outside code, whose alternative text is missing or empty."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for match in re.finditer(r"!\[\s*\]\(([^)]{0,60})", prose):
        yield f"a markdown picture without alt text: {match.group(1)}"
    for match in re.finditer(r"<img\b(?:\"[^\"]*\"|'[^']*'|[^>\"'])*>", prose, flags=re.IGNORECASE):
        if not re.search(
            r"""\balt\s*=\s*(?:"\s*[^"\s]|'\s*[^'\s])""", match.group(), flags=re.IGNORECASE
        ):
            yield f"an <img> without alt text: {match.group()[:60]}"


# ---- the command --------------------------------------------------------------------------------------------------------


def build(source: Path) -> NotebookNode:
    """The learner's notebook: solutions folded, every cell run. Raises CellExecutionError, or ValueError naming all that is wrong."""
    notebook = execute(fold_solutions(read_source(source)), target(source).parent)
    for line in clean(notebook):
        print(line, end="", file=sys.stderr)
    if found := problems(notebook):
        raise ValueError("\n  ".join([f"{target(source).name} was not written:", *found]))
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write beside the target and rename, so that a reader never meets half a notebook."""
    nbformat.validate(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8", newline="\n"
    ) as file:
        file.write(nbformat.writes(notebook).rstrip("\n") + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def check() -> int:
    """Print every notebook that is older than its source or has none."""
    stale = [
        f"{target(source).name} is older than src/{source.name}"
        for source in sources()
        if is_stale(source)
    ]
    known = {target(source) for source in sources()}
    stale += [
        f"{path.name} has no source in src/"
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
        if path not in known
    ]
    print("\n".join(stale) if stale else "every notebook is as new as its source")
    return int(bool(stale))


def chosen(stems: list[str]) -> list[Path]:
    by_stem = {source.stem: source for source in sources()}
    if unknown := [stem for stem in stems if stem not in by_stem]:
        raise SystemExit(
            f"no such lesson: {', '.join(unknown)}; there are {', '.join(by_stem) or 'none'}"
        )
    return [by_stem[stem] for stem in stems] if stems else list(by_stem.values())


def build_all(lessons: list[Path], force: bool) -> int:
    failed = 0
    for source in lessons:
        if not force and not is_stale(source):
            print(f"{source.stem}: as new as its source")
            continue
        try:
            write(notebook := build(source), target(source))
            print(
                f"{source.stem}: {len(notebook.cells)} cells, {target(source).stat().st_size:,} bytes"
            )
        except (CellExecutionError, ValueError) as error:
            print(f"{source.stem}: {error}", file=sys.stderr)
            failed += 1
    return int(failed > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build and run the lessons.")
    parser.add_argument(
        "lesson", nargs="*", help="stems such as 04_rope; all lessons if none is named"
    )
    parser.add_argument(
        "--force", action="store_true", help="build notebooks that are as new as their source too"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only name the notebooks that are older than their source",
    )
    parser.add_argument(
        "--solutions", action="store_true", help="write the solved lessons, not run, into --out"
    )
    parser.add_argument("--out", type=Path, help="folder for --solutions")
    options = parser.parse_args(arguments)
    if options.solutions != (options.out is not None):
        parser.error("--solutions and --out belong together")
    if options.check:
        return check()
    if options.solutions:
        for source in chosen(options.lesson):
            write(apply_solutions(read_source(source)), options.out / target(source).name)
        return 0
    return build_all(chosen(options.lesson), options.force)


if __name__ == "__main__":
    sys.exit(main())
