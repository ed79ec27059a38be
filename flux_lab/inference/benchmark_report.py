"""What `flux-lab bench --json FILE` has written, as a table in Markdown and as a figure.

python -m flux_lab.inference.benchmark_report FILE      prints the table and draws the figure beside FILE
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux_lab.inference.benchmark_cases import COMPILED, FAST, OURS, REFERENCE, UNCHECKED
from flux_lab.instruments.plots import encoded, ratio_bars

SIDES = (OURS, UNCHECKED, FAST, COMPILED)
HEADER = ("case", "diffusers, ms", *SIDES, "peak memory, fast", "of the product rate, fast", "its products alone", "rounds")


def read(file: str | Path) -> dict[str, Any]:
    """The file's `conditions`, `rates` and `results`."""
    return json.loads(Path(file).read_text(encoding="utf-8"))


def by_case(held: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Case -> side -> result, in the file's order."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for result in held["results"]:
        cases.setdefault(result["case"], {})[result["side"]] = result
    return cases


def ratios(held: dict[str, Any], sides: Sequence[str] = SIDES) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Case -> side -> ratio to the reference's time: median and quartiles, for `ratio_bars`."""
    return {
        case: {side: tuple(results[side]["ratio"][name] for name in ("median", "low", "high")) for side in sides if side in results}
        for case, results in by_case(held).items()
    }


def conditions_in_words(held: dict[str, Any]) -> str:
    """What the numbers hold for, in one sentence."""
    found = held["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{found['cores']} cores of {found['machine']}, {found['threads']} threads, {found['device']}; {versions}"


def rows(held: dict[str, Any]) -> list[list[str]]:
    """A row for each case: times as shares of the reference's; peak memory as a share of the reference's, too.

    `its products alone`: the part of the fast path's share that its matrix products take. No other change can bring it lower.
    """
    table = []
    for case, results in by_case(held).items():
        reference, fast = results[REFERENCE], results[FAST]
        shares = [f"{results[side]['ratio']['median']:.2f}" if side in results else "" for side in SIDES]
        memory = f"{fast['peak_bytes'] / reference['peak_bytes']:.2f}" if fast["peak_bytes"] else ""
        share = f"{fast['share']:.0%}" if fast["share"] else ""
        products = f"{fast['in_products'] * fast['ratio']['median']:.2f}" if fast.get("in_products") else ""
        table.append([case, f"{1000 * reference['seconds']['median']:.0f}", *shares, memory, share, products, str(fast["rounds"])])
    return table


def markdown(held: dict[str, Any]) -> str:
    """The table in Markdown, under a line that says what it holds for."""
    marks = ["---", *["---:"] * (len(HEADER) - 1)]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in (HEADER, marks, *rows(held)))
    return f"Time as a share of diffusers' or transformers', below 1 is faster; {conditions_in_words(held)}.\n\n{lines}\n"


def write_figure(file: str | Path) -> Path:
    """Draw the ratios beside the file: its name, ending in .png."""
    target = Path(file).with_suffix(".png")
    target.write_bytes(encoded(ratio_bars(ratios(read(file))))[1])
    return target


if __name__ == "__main__":
    print(markdown(read(sys.argv[1])))
    print(f"figure: {write_figure(sys.argv[1]).name}")
