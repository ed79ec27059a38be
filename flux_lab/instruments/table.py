"""A table that reads well in a notebook, on a code-hosting site and in a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header. Numbers are set with thousands separators and stand to the right.

    Raises ValueError for a row that is longer or shorter than the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"Table: expected {len(self.header)} cells a row ({', '.join(self.header)}), got {len(row)}: {list(row)}")

    def _repr_markdown_(self) -> str:
        marks = ["---:" if self._is_numeric(column) else "---" for column in range(len(self.header))]
        lines = [self.header, marks, *([cell_text(cell).replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def __repr__(self) -> str:
        lines = [list(self.header), *([cell_text(cell).replace("`", "") for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        right = [self._is_numeric(column) for column in range(len(self.header))]
        aligned = (
            [cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in zip(line, widths, right, strict=True)]
            for line in lines
        )
        return "\n".join("  ".join(line).rstrip() for line in aligned)

    def _is_numeric(self, column: int) -> bool:
        return bool(self.rows) and all(is_number(row[column]) for row in self.rows)


def is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def cell_text(cell: object) -> str:
    """How a value is written in a cell: whole numbers from 10,000 on with separators, tuples as [1, 2]."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) and not isinstance(cell, bool) and abs(cell) >= 10_000:
        return f"{cell:,}"
    if isinstance(cell, tuple | list):
        return "[" + ", ".join(map(cell_text, cell)) + "]"
    return str(cell)
