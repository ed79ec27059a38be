"""Parity: every component beside its counterpart in diffusers or transformers, with the same random weights and inputs.

    flux-lab parity [--json FILE]     or     python -m flux_lab.instruments.parity [--json FILE]

prints a table, one row a component: the largest absolute difference in each dtype, or "equal" when every bit is the same.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from flux_lab import data_dir, files
from flux_lab.instruments.parity_cases import Case, cases

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Result(NamedTuple):
    """`largest`: the largest absolute difference; `equal`: bit for bit; `within`: inside the bound of the case."""

    largest: float
    equal: bool
    within: bool


def measure(case: Case, dtype: torch.dtype) -> Result:
    """Run one case in one dtype and compare."""
    with torch.no_grad():
        ours, reference = case.run(dtype)
    pairs = list(zip(ours, reference, strict=True))
    if any(mine.shape != theirs.shape or mine.dtype != theirs.dtype for mine, theirs in pairs):
        return Result(float("inf"), equal=False, within=False)
    largest = max((mine.double() - theirs.double()).abs().max().item() for mine, theirs in pairs)
    equal = all(torch.equal(mine, theirs) for mine, theirs in pairs)
    return Result(largest, equal, within=all(bool(case.bound(mine, theirs)) for mine, theirs in pairs))


def bundled() -> Path | None:
    """The folder of the bundled miniature, or None where it is not."""
    try:
        folder = data_dir() / "flux-mini"
    except FileNotFoundError:
        return None
    return folder if (folder / "model_index.json").is_file() else None


def rows(folder: Path | None) -> Iterator[tuple[Case, dict[str, Result]]]:
    """Run all cases, one after the other."""
    for case in cases(folder):
        yield case, {name: measure(case, dtype) for name, dtype in DTYPES.items() if dtype in case.dtypes}


def be_quiet() -> None:
    """No notices and progress bars of the references between the rows."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}


def main(folder: Path | None = None, json_file: Path | None = None) -> int:
    """Print the table as Markdown, row by row. Returns 1 if a bound is broken, else 0.

    `folder`: the checkpoint for the tokenizers and the whole pipeline, by default the bundled miniature. `json_file`: where the table
    goes as JSON.
    """
    be_quiet()
    folder, table = folder or bundled(), []
    print("Largest absolute difference on the CPU; `equal`: every bit is the same.")
    print(", ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"\n| component | flux_lab | reference | {' | '.join(DTYPES)} |\n|---|---|---|{'---:|' * len(DTYPES)}")
    for case, results in rows(folder):
        table.append((case, results))
        cells = [cell(results.get(name)) for name in DTYPES]
        print(f"| {case.name} | `{case.file}` | {case.reference} | {' | '.join(cells)} |", flush=True)
    if folder is None:
        print("\nThe bundled miniature is missing: no tokenizers, no whole pipeline.")
    if json_file is not None:
        write_json(json_file, table)
    return int(not all(result.within for _, results in table for result in results.values()))


def cell(result: Result | None) -> str:
    if result is None:
        return ""
    return ("equal" if result.equal else f"{result.largest:.1e}") + ("" if result.within else " **out of bounds**")


def write_json(file: Path, table: list[tuple[Case, dict[str, Result]]]) -> None:
    """The table for a program: the versions, and for each row what was compared and its results by dtype."""
    found = [
        {
            "component": case.name,
            "file": case.file,
            "reference": case.reference,
            "results": {name: each._asdict() for name, each in results.items()},
        }
        for case, results in table
    ]
    files.write_json(file, {"versions": versions(), "rows": found})


if __name__ == "__main__":
    from flux_lab.__main__ import main as command_line

    sys.exit(command_line(["parity", *sys.argv[1:]]))
