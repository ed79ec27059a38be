"""Every link in the lessons and guides leads to a file, and to a heading, that is there."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from notebooks import build

ROOT = build.NOTEBOOKS.parent
READMES = ("README.md", "notebooks/README.md", "data/flux-mini/README.md", "data/sd15-mini/README.md")
DOCUMENTS = [*sorted(build.NOTEBOOKS.glob("*.ipynb")), *[ROOT / name for name in READMES if (ROOT / name).exists()]]


def text_of(document: Path) -> str:
    """The markdown of a document, without code."""
    if document.suffix == ".ipynb":
        cells = nbformat.read(document, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = document.read_text(encoding="utf-8")
    return re.sub(r"```.*?```|`[^`\n]*`", lambda code: "`" if code.group().startswith("```") else code.group(), text, flags=re.DOTALL)


def links(text: str) -> Iterator[str]:
    """What `[words](target)`, `![words](target)`, `href` and `src` lead to."""
    prose = re.sub(r"`[^`\n]*`", "code", text)
    for pattern in (r"\]\(\s*<?([^)\s>]+)", r"""<[^>]*\b(?:href|src)\s*=\s*["']([^"']+)"""):
        yield from re.findall(pattern, prose)


def anchors(document: Path) -> set[str]:
    """What may follow `#`: JupyterLab keeps a heading's letters and joins its words, code-hosting sites also drop case and signs."""
    if document.suffix not in (".md", ".ipynb"):
        return set()
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", text_of(document), flags=re.M)
    jupyter = {heading.replace("`", "").replace(" ", "-") for heading in headings}
    hosted = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return jupyter if document.suffix == ".ipynb" else hosted


def fault(document: Path, target: str) -> str | None:
    """Why a link leads nowhere; None if it leads somewhere, or out into the network."""
    if re.match(r"[a-z]+:", target, flags=re.IGNORECASE):
        return None if target.startswith(("https://", "data:image/")) else f"{target}: expected https"
    path, _, anchor = unquote(target).partition("#")
    file = (document.parent / path).resolve() if path else document
    if not file.exists():
        return f"{target}: there is no such file"
    if not file.is_relative_to(ROOT) and file != document:
        return f"{target}: it leads out of the project"
    return f"{target}: there is no such heading" if anchor and anchor not in anchors(file) else None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    assert [said for target in links(text_of(document)) if (said := fault(document, target))] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](b.md) and ![c](d.png 'title')", ["b.md", "d.png"]),
        ("[a `b`](c.md#the-idea)", ["c.md#the-idea"]),
        ('<a href="a.md">x</a> <img alt="y" src="b.png">', ["b.png", "a.md"]),
        ("`[a](b.md)` and $f[i](x)", ["x"]),
        ("```\n[a](b.md)\n```", []),
    ],
)
def test_links_are_found(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(text)
    assert sorted(links(text_of(tmp_path / "a.md"))) == sorted(expected)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("a.md", None),
        ("#one-idea-more", None),
        ("b.ipynb#One-idea:-more", None),
        ("https://example.org/none", None),
        ("http://example.org", "http://example.org: expected https"),
        ("c.md", "c.md: there is no such file"),
        ("#two", "#two: there is no such heading"),
        ("b.ipynb#one-idea-more", "b.ipynb#one-idea-more: there is no such heading"),
    ],
)
def test_fault_is_named(target: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    heading = "# One idea: more"
    (tmp_path / "a.md").write_text(heading)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(heading)]), tmp_path / "b.ipynb")
    assert fault(tmp_path / "a.md", target) == said
