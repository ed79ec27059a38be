"""The benchmark: ours, the fast path and diffusers/transformers on the same work, in the same run.

    flux-lab bench [--quick] [--compile] [--only NAME ...] [--json FILE]

The sides take turns, so that whatever else the machine does meets all of them; a ratio is taken within each round, and its median and
quartiles are reported. Before it is timed, every side is run once, and its result compared with the reference's. A FILE that is there
already keeps its other cases, so that the whole can be measured in pieces; benchmark_report.py makes a table and a figure of it.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flux_lab import files
from flux_lab.inference.benchmark_cases import CASES, COMPILED, QUICK, REFERENCE, Case, Settings
from flux_lab.inference.fast_linear import FastLinear
from flux_lab.inference.live_bytes import LiveBytes

GIGA, MEBI = 1e9, 2**20
LEAST_ROUNDS = 3
# PyTorch's counter does not know attention's kernel for CPUs, nor oneDNN's product. Each gets the shapes of the arguments.
KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
}
if torch.backends.mkldnn.is_available():
    KERNELS[torch.ops.mkldnn._linear_pointwise] = lambda rows, weight, *_, **__: 2 * math.prod(rows) * weight[0]
# What the profiler calls the operations that multiply matrices, and no others inside them.
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "convolution")} | {str(op).replace(".", "::") for op in KERNELS}


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
    matrix products that this machine was measured to have, counting the reference's FLOPs; `in_products`, the share of the time that is
    spent in matrix products and attention. None where there is no such number. `rounds`: how often it was timed.
    """

    case: str
    side: str
    seconds: Spread
    ratio: Spread
    error: float | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    share: float | None = None
    in_products: float | None = None
    rounds: int = 1


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


def alternate(sides: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, list[float]]:
    """Seconds of every call: each round runs all sides once, and begins with another one than the round before.

    There are `repeats` rounds, or as many, but at least three, as begin in the first `seconds`.
    """
    names, times, began = list(sides), {side: [] for side in sides}, time.perf_counter()
    for turn in range(settings.repeats):
        if turn >= LEAST_ROUNDS and time.perf_counter() - began > settings.seconds:
            break
        start = turn % len(names)
        for side in names[start:] + names[:start]:
            times[side].append(seconds_of(sides[side], settings.device))
    return times


def product_rate(size: int, dtype: torch.dtype, device: str, repeats: int = 7) -> float:
    """FLOPs a second of a square matrix product, the best of several and of both libraries: what this machine can do."""
    rows, layer = torch.randn(size, size, device=device).to(dtype), nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        calls = [partial(each, rows) for each in (layer, FastLinear(layer))]
        return 2 * size**3 / min(seconds_of(call, device) for _ in range(repeats + 1) for call in calls)


def memory_rate(device: str, count: int = 2**25, repeats: int = 7) -> float:
    """Bytes a second, read and written, of copying many numbers, the best of several: what this machine's memory can do."""
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(repeats))


@torch.no_grad()
def measure(case: Case, settings: Settings, rate: float) -> list[Result]:
    """Compare, count and time one case."""
    first = {side: counted(call, case) if case.counted and side != COMPILED else (call(), None, None) for side, call in case.sides.items()}
    times = alternate(case.sides, replace(settings, seconds=settings.seconds * case.share))
    wanted, work, _ = first[REFERENCE]
    results = []
    for side, seconds in times.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, times[REFERENCE], strict=True)]
        (output, flops, peak), median = first[side], statistics.median(seconds)
        results.append(
            Result(
                case=case.name,
                side=side,
                seconds=spread(seconds),
                ratio=spread(ratios),
                error=relative_error(output, wanted),
                peak_bytes=peak,
                flops=flops,
                share=work / median / rate if work else None,
                in_products=time_in_products(case.sides[side]) if case.counted and settings.device == "cpu" else None,
                rounds=len(seconds),
            )
        )
    return results


def time_in_products(call: Callable[[], Any]) -> float:
    """The share of a call's time on the CPU that matrix products and attention take, as the profiler sees it: a little too small, as it
    takes about a microsecond itself for each operation."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    events = seen.key_averages()
    return sum(event.cpu_time_total for event in events if event.key in PRODUCTS) / sum(event.self_cpu_time_total for event in events)


def relative_error(given: Tensor | None, wanted: Tensor | None) -> float | None:
    if given is None or wanted is None:
        return None
    return ((given.float() - wanted.float()).norm() / wanted.float().norm()).item()


def counted(call: Callable[[], Any], case: Case) -> tuple[Tensor | None, int, int]:
    """What a call gives, its FLOPs and its peak bytes."""
    weights = [tensor for model in case.weights for tensor in (*model.parameters(), *model.buffers())]
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter, LiveBytes(ignored=weights) as live:
        output = call()
    return output, counter.get_total_flops(), live.peak


def run(names: Sequence[str], settings: Settings, rates: dict[torch.dtype, float]) -> Iterator[list[Result]]:
    """The results of the named groups of cases, case by case. `rates` of matrix products are put in as they are measured."""
    for name in names:
        with torch.no_grad():
            for case in CASES[name](settings):
                if case.dtype not in rates:
                    rates[case.dtype] = product_rate(settings.product, case.dtype, settings.device)
                yield measure(case, settings, rates[case.dtype])


# ---- the table and the file ---------------------------------------------------------------------------------------------

HEADER = ("case", "side", "ms", "ratio", "quartiles", "error", "peak MiB", "GFLOP", "of the rate", "in products")


def cells(result: Result) -> list[str]:
    """One row of the table."""
    ratio = result.ratio
    optional = {
        "error": result.error is not None and f"{result.error:.0e}",
        "peak": result.peak_bytes is not None and f"{result.peak_bytes / MEBI:.1f}",
        "flops": result.flops is not None and f"{result.flops / GIGA:.2f}",
        "share": result.share is not None and f"{result.share:.0%}",
        "in_products": result.in_products is not None and f"{result.in_products:.0%}",
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


def read_json(file: Path, settings: Settings) -> dict[str, Any]:
    """What `file` holds, for further cases to be put in. Raises ValueError for results that were measured under other conditions."""
    now = conditions(settings)
    if not file.exists():
        return {"conditions": now, "rates": {}, "results": []}
    held = json.loads(file.read_text(encoding="utf-8"))
    before = held["conditions"]
    changed = [f"{name} {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"--json: {file.name} holds results for {'; '.join(changed)}: choose another file, or remove it")
    return held


def write_json(file: Path, held: dict[str, Any], results: Sequence[Result]) -> None:
    """Put the results of one case, or of several, in the place of older ones of the same name."""
    rows = [asdict(result) | {"seconds": result.seconds._asdict(), "ratio": result.ratio._asdict()} for result in results]
    replaced = {result.case for result in results}
    held["results"] = [row for row in held["results"] if row["case"] not in replaced] + rows
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file, held)


def main(only: Sequence[str] = (), json_file: Path | None = None, quick: bool = False, compile: bool = False, device: str = "cpu") -> int:
    """Print the table as Markdown, case by case. Raises ValueError for the name of a case that there is not."""
    unknown = [name for name in only if name not in CASES]
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    be_quiet()
    settings = replace(QUICK if quick else Settings(), compile=compile, device=device)
    return report([name for name in CASES if name in only or not only], settings, json_file)


def report(names: Sequence[str], settings: Settings, json_file: Path | None) -> int:
    held = None if json_file is None else read_json(json_file, settings)
    found = conditions(settings)
    print(", ".join(f"{name} {number}" for name, number in found.pop("versions").items()))
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print("Ratios are to the reference, diffusers or transformers: below 1 is faster.\n")
    print(row(HEADER), row(["---", "---", *["---:"] * (len(HEADER) - 2)]), sep="\n", flush=True)
    rates, memory = {}, memory_rate(settings.device)
    for results in run(names, settings, rates):
        print(*(row(cells(result)) for result in results), sep="\n", flush=True)
        if json_file is not None:
            held["rates"] |= {"memory": memory, **{str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}}
            write_json(json_file, held, results)
    if json_file is not None:
        from flux_lab.inference.benchmark_report import write_figure

        write_figure(json_file)
    return 0


def be_quiet() -> None:
    """No notices and progress bars of the references between the rows."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
