"""The benchmark: ours, the fast path and diffusers/transformers on the same work, in the same run.

    flux-lab bench [--quick] [--compile] [--only NAME ...] [--json FILE]

The sides take turns, so that whatever else the machine does meets all of them; a ratio is taken within each round, and its median and
quartiles are reported. Before it is timed, every side is run once, and its result compared with the reference's.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flux_lab.inference.benchmark_cases import CASES, COMPILED, QUICK, REFERENCE, Case, Settings
from flux_lab.inference.live_bytes import LiveBytes

GIGA, MEBI = 1e9, 2**20


class Spread(NamedTuple):
    """Median and quartiles of several repeats."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One side of one case.

    `seconds` of one call; `ratio` to the reference's, round by round; `error`, the relative distance from the reference's result;
    `peak_bytes` of the tensors alive during a call, without the weights; `flops` of the products in one call; `share` of the rate of
    matrix products that this machine was measured to have, counting the reference's FLOPs. None where there is no such number.
    """

    case: str
    side: str
    seconds: Spread
    ratio: Spread
    error: float | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    share: float | None = None


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def seconds_of(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(sides: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call: each round runs all sides once, and begins with another one than the round before."""
    names, times = list(sides), {side: [] for side in sides}
    for turn in range(repeats):
        start = turn % len(names)
        for side in names[start:] + names[:start]:
            times[side].append(seconds_of(sides[side], device))
    return times


def product_rate(size: int, dtype: torch.dtype, device: str, repeats: int = 7) -> float:
    """FLOPs a second of a square matrix product, the best of several: what this machine can do."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(left, right), device) for _ in range(repeats))


@torch.no_grad()
def measure(case: Case, settings: Settings, rate: float) -> list[Result]:
    """Compare, count and time one case."""
    outputs = {side: call() for side, call in case.sides.items()}  # which warms up, too
    flops = {side: count_flops(call) if case.counted and side != COMPILED else None for side, call in case.sides.items()}
    peaks = {side: peak_bytes(call, case) if case.counted and side != COMPILED else None for side, call in case.sides.items()}
    times = alternate(case.sides, settings.repeats, settings.device)
    results = []
    for side, seconds in times.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, times[REFERENCE], strict=True)]
        work, median = flops[REFERENCE], statistics.median(seconds)
        results.append(
            Result(
                case=case.name,
                side=side,
                seconds=spread(seconds),
                ratio=spread(ratios),
                error=relative_error(outputs[side], outputs[REFERENCE]),
                peak_bytes=peaks[side],
                flops=flops[side],
                share=work / median / rate if work else None,
            )
        )
    return results


def relative_error(given: Tensor | None, wanted: Tensor | None) -> float | None:
    if given is None or wanted is None:
        return None
    return ((given.float() - wanted.float()).norm() / wanted.float().norm()).item()


def count_flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_bytes(call: Callable[[], Any], case: Case) -> int:
    weights = [tensor for model in case.weights for tensor in (*model.parameters(), *model.buffers())]
    with LiveBytes(ignored=weights) as live:
        call()
    return live.peak


def run(names: Sequence[str], settings: Settings) -> Iterator[list[Result]]:
    """The results of the named groups of cases, case by case."""
    rates: dict[torch.dtype, float] = {}
    for name in names:
        with torch.no_grad():
            for case in CASES[name](settings):
                if case.dtype not in rates:
                    rates[case.dtype] = product_rate(settings.product, case.dtype, settings.device)
                yield measure(case, settings, rates[case.dtype])


# ---- the table and the file ---------------------------------------------------------------------------------------------

HEADER = ("case", "side", "ms", "ratio", "quartiles", "error", "peak MiB", "GFLOP", "of the rate")


def cells(result: Result) -> list[str]:
    """One row of the table."""
    ratio = result.ratio
    optional = {
        "error": result.error is not None and f"{result.error:.0e}",
        "peak": result.peak_bytes is not None and f"{result.peak_bytes / MEBI:.1f}",
        "flops": result.flops is not None and f"{result.flops / GIGA:.2f}",
        "share": result.share is not None and f"{result.share:.0%}",
    }
    first = [result.case, result.side, f"{result.seconds.median * 1000:.1f}", f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}"]
    return first + [text or "" for text in optional.values()]


def row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def conditions(settings: Settings) -> dict[str, Any]:
    """What the numbers hold for. No name of the machine and no path."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": settings.device}
    return {"versions": libraries, **machine, "repeats": settings.repeats}


def write_json(file: Path, settings: Settings, results: Sequence[Result]) -> None:
    rows = [asdict(result) | {"seconds": result.seconds._asdict(), "ratio": result.ratio._asdict()} for result in results]
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"conditions": conditions(settings), "results": rows}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def main(only: Sequence[str] = (), json_file: Path | None = None, quick: bool = False, compile: bool = False, device: str = "cpu") -> int:
    """Print the table as Markdown, case by case. Raises ValueError for the name of a case that there is not."""
    unknown = [name for name in only if name not in CASES]
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    be_quiet()
    settings = replace(QUICK if quick else Settings(), compile=compile, device=device)
    return report([name for name in CASES if name in only or not only], settings, json_file)


def report(names: Sequence[str], settings: Settings, json_file: Path | None) -> int:
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    found = conditions(settings)
    print(", ".join(f"{name} {number}" for name, number in found.pop("versions").items()))
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print("Ratios are to the reference, diffusers or transformers: below 1 is faster.\n")
    print(row(HEADER), row(["---", "---", *["---:"] * (len(HEADER) - 2)]), sep="\n", flush=True)
    results = []
    for case in run(names, settings):
        results += case
        print(*(row(cells(result)) for result in case), sep="\n", flush=True)
    if json_file is not None:
        write_json(json_file, settings, results)
    return 0


def be_quiet() -> None:
    """No notices and progress bars of the references between the rows."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
