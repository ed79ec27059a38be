"""The package's own code, shown in a lesson as it is now, so that a lesson never quotes something old."""

import ast
import inspect
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

EM = 0.62  # the width of a character of code, in sizes of the text's letters, and a little more
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Listing:
    """Lines of code and where they stand. A notebook shows them highlighted in its own colours."""

    code: str
    place: str

    def _repr_markdown_(self) -> str:
        """The code at its full width: JupyterLab breaks longer lines in the middle of a word, but scrolls what is wide."""
        fence = "````" if "```" in self.code else "```"
        width = math.ceil(EM * max(map(len, self.code.splitlines()), default=0))
        return f'**{self.place}**\n<div style="min-width: {width}em">\n\n{fence}python\n{self.code}\n{fence}\n\n</div>'

    def __repr__(self) -> str:
        return f"# {self.place}\n{self.code}"


def source(obj: Any, docstring: bool = True) -> Listing:
    """The code of a function, method, class or module; of anything else, the code of its class.

    `docstring=False` leaves out its docstrings, those of a class's methods and of a module's functions too.
    Raises TypeError for what is not written in Python.
    """
    obj = inspect.unwrap(obj) if isinstance(obj, FunctionType | MethodType) else obj
    if not isinstance(obj, FunctionType | MethodType | ModuleType | type):
        obj = type(obj)
    try:
        lines, first = inspect.getsourcelines(obj)
        file = Path(inspect.getsourcefile(obj)).resolve()
    except (OSError, TypeError) as error:
        raise TypeError(f"source: expected a function, class or module written in Python, got {obj!r}") from error
    last = first + len(lines) - 1
    span = "" if isinstance(obj, ModuleType) else f", lines {first} to {last}"
    code = textwrap.dedent("".join(lines)).rstrip()
    return Listing(code if docstring else without_docstrings(code), f"{_shown_path(file)}{span}")


def without_docstrings(code: str) -> str:
    """The same lines, comments and blank lines included, without those of the docstrings. A body of nothing else keeps its docstring."""
    lines = code.splitlines()
    dropped = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module) and len(node.body) > 1:
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None:
                following = [first.end_lineno + 1] if lines[first.end_lineno : first.end_lineno + 1] == [""] else []
                dropped |= {*range(first.lineno, first.end_lineno + 1), *following}
    return "\n".join(line for number, line in enumerate(lines, start=1) if number not in dropped)


def _shown_path(file: Path) -> str:
    """`flux_lab/rope.py`; of other files the name alone."""
    return file.relative_to(PACKAGE.parent).as_posix() if file.is_relative_to(PACKAGE) else file.name
