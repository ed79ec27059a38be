"""Proof at full size without the real weights: a transformer of random numbers, run from disk under a memory limit.

    python -m flux_lab.inference.full_size --folder /big/disk/bf16 --limit 6GB
    python -m flux_lab.inference.full_size --folder /big/disk/nf4 --scheme nf4 --device cuda --resident --size 1024 --steps 20 --limit 16GB

Three numbers are taken: the time to read the file with a cold page cache, the time of the bare matrix products, and the time of the run,
which cannot be shorter than the larger of the two, with its peak memory. The limit is the operating system's for the CPU, see
`memory_limit`, and the allocator's for CUDA. A single step is run as it is; several are run with hoisted modulation.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_lab.checkpoints import TRANSFORMER, check_device
from flux_lab.config import FluxTransformer2DConfig
from flux_lab.files import write_json
from flux_lab.inference.budget import gb, parse_bytes
from flux_lab.inference.hoisting import Conditioning
from flux_lab.inference.int8 import integer_product
from flux_lab.inference.loading import load_lean, open_model
from flux_lab.inference.memory_limit import Group, limit_addresses, memory_group
from flux_lab.inference.parts import MODELS
from flux_lab.inference.quantization import SCHEMES, stored_scheme
from flux_lab.inference.random_checkpoint import on_meta, write_random
from flux_lab.inference.stream_log import LoggedStreamer
from flux_lab.inference.weight_files import ReusedMemory, read_past_cache
from flux_lab.latents import PATCH, prepare_latent_image_ids
from flux_lab.transformer import TIME_SCALE

# What a process of its own does: take the bounds, or run, limited by the group that it joins, or by itself.
BOUNDS, GROUP, ALONE = "bounds", "group", "alone"
# For Linux' allocator: one arena, because addresses that nobody uses would count; and what has been freed is kept for the next tensor,
# because memory that is new has to be cleared by the system.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
# Read at a time when nothing but reading is timed.
PIECE = 2**28
# Results that agree in these are of the same run.
SAME_RUN = ("model", "blocks", "scheme", "size", "device")


# ------------------------------------------------------------------------------------------------------------- what limits the speed


def seconds_to_read(file: Path) -> float:
    """Read the file once, past the system's cache, into memory that has been used before."""
    make_cold(file)
    memory = ReusedMemory().take(PIECE)
    memory.fill(0)
    start = time.perf_counter()
    for place in range(0, file.stat().st_size, PIECE):
        read_past_cache(file, place, memory)
    return time.perf_counter() - start


def make_cold(file: Path) -> None:
    """Ask the system to forget the file's pages."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def seconds_of_products(config: FluxTransformer2DConfig, inputs: dict[str, Tensor], scheme: str | None, device: str) -> float:
    """The matrix products of one pass and nothing else: each shape is timed, the median of three, and counted as often as it occurs.

    In bf16; in int8 the products of whole numbers.
    """
    model, shapes = on_meta(config, None), Counter()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, given, _: shapes.update([(given[0].shape[:-1].numel(), *layer.weight.shape)]))
    model(**{name: value.to("meta") for name, value in inputs.items()})
    total = 0.0
    for (rows, out_features, in_features), count in shapes.items():
        x, weight = (torch.randn(size, in_features, device=device).to(torch.bfloat16) for size in (rows, out_features))
        if scheme == "int8":
            x, weight = x.to(torch.int8), weight.to(torch.int8)
        product = integer_product if scheme == "int8" else F.linear
        product(x, weight)
        total += count * statistics.median(_timed(lambda: product(x, weight), device) for _ in range(3))  # noqa: B023
    return total


def _timed(run: Any, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------------------ the run


def make_inputs(config: FluxTransformer2DConfig, size: int, length: int, device: str) -> dict[str, Tensor]:
    """Random inputs of one pass, for a picture of `size` x `size` pixels."""
    side = size // (8 * PATCH)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (1, side * side, config.in_channels),
        "encoder_hidden_states": (1, length, config.joint_attention_dim),
        "pooled_projections": (1, config.pooled_projection_dim),
    }
    inputs = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    inputs |= {"img_ids": prepare_latent_image_ids(side, side, torch.bfloat16), "txt_ids": torch.zeros(length, 3).bfloat16()}
    inputs |= {"timestep": torch.ones(1).bfloat16()} | ({"guidance": torch.full((1,), 3.5)} if config.guidance_embeds else {})
    return {name: value.to(device) for name, value in inputs.items()}


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Inside the limited process: all steps, from a cold page cache. Returns seconds and peak bytes."""
    limit = parse_bytes(arguments.limit)
    if limit is not None and arguments.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    elif limit is not None and arguments.inside != GROUP:
        limit_addresses(limit)
    start, seconds = time.perf_counter(), []
    inputs = make_inputs(read_config(arguments.folder), arguments.size, arguments.length, arguments.device)
    times = [torch.tensor([1 - step / arguments.steps]).bfloat16().to(arguments.device) for step in range(arguments.steps)]
    guidance = [inputs["guidance"].bfloat16() * TIME_SCALE] if "guidance" in inputs else []
    conditionings = [(each * TIME_SCALE, *guidance, inputs["pooled_projections"]) for each in times]
    # Hoisting reads the modulation weights before the first step, when there is nothing to compute: it pays from the second step on.
    log: list[LoggedStreamer] = []
    with open_transformer(arguments, conditionings if arguments.steps > 1 else (), log) as transformer:
        seconds.append(time.perf_counter() - start)
        for each in times:
            seconds.append(_timed(lambda: inputs.update(hidden_states=transformer(**inputs | {"timestep": each})), arguments.device))  # noqa: B023
        whole = time.perf_counter() - start
    finite = bool(inputs["hidden_states"].isfinite().all())
    return {
        "seconds": whole,
        "opening": seconds[0],
        "steps": seconds[1:],
        "finite": finite,
        "threads_seconds": threads_seconds(log),
    } | peak(arguments.device)


def open_transformer(arguments: argparse.Namespace, conditionings: Sequence[Conditioning], log: list[LoggedStreamer]) -> Any:
    """The transformer for a `with` block: streamed, with its streamer in `log`, or all of it in memory."""
    if arguments.resident:
        return contextlib.nullcontext(load_lean(arguments.folder, device=arguments.device, conditionings=conditionings))
    model, read = open_model(arguments.folder, arguments.device, None, conditionings, mapped=False)
    log.append(LoggedStreamer(model, read, arguments.device, parse_bytes(arguments.budget)))
    return log[0]


def threads_seconds(log: list[LoggedStreamer]) -> dict[str, float]:
    """How long the streamer's threads were "reading", "waiting" for what is read, and "computing"."""
    totals = Counter()
    for what, start, stop in [event for streamer in log for events in streamer.rows.values() for event in events]:
        totals[what] += stop - start
    return dict(totals)


def peak(device: str) -> dict[str, int]:
    """The largest resident memory of this process, and of the GPU's allocator."""
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = kilobytes * (1 if sys.platform == "darwin" else 1024)
    return {"resident": resident} | ({"reserved": torch.cuda.max_memory_reserved()} if device == "cuda" else {})


def read_config(folder: Path) -> FluxTransformer2DConfig:
    return FluxTransformer2DConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    """Write the checkpoint if it is not there, take the three numbers, print and keep them."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    check_device(arguments.device)
    if arguments.inside:
        print(json.dumps(bounds(arguments) if arguments.inside == BOUNDS else run(arguments)))
        return 0
    file = prepare(arguments)
    alone = inside(BOUNDS, argv)
    print(", ".join(f"{name} alone {seconds:.1f} s" for name, seconds in alone.items()), flush=True)
    make_cold(file)
    limit = None if arguments.device == "cuda" else parse_bytes(arguments.limit)
    with contextlib.nullcontext() if limit is None else memory_group(limit) as group:
        found = inside(GROUP if group else ALONE, argv, group)
        found |= {"group": group.peak} if group else {}
    keeper = "CUDA's allocator" if arguments.device == "cuda" else "a control group" if group else "RLIMIT_AS"
    config = read_config(arguments.folder)
    result = {"model": arguments.model, "blocks": [config.num_layers, config.num_single_layers], "scheme": arguments.scheme or "bf16"}
    result |= {"size": arguments.size, "device": arguments.device, "machine": machine(arguments.device), "file": file.stat().st_size}
    result |= {"limit": arguments.limit, "limit_by": keeper if arguments.limit else None, "threads": torch.get_num_threads()}
    result |= alone | found
    print(describe(arguments, result))
    if arguments.json:
        keep(result, arguments.json)
    return 0


def prepare(arguments: argparse.Namespace) -> Path:
    """The checkpoint's file, written if it is not there. Raises ValueError when the folder holds another checkpoint."""
    config = MODELS[arguments.model].transformer
    if arguments.blocks:
        config = dataclasses.replace(config, num_layers=arguments.blocks[0], num_single_layers=arguments.blocks[1])
    file = arguments.folder / f"{TRANSFORMER.weights}.safetensors"
    if not file.exists():
        write_random(arguments.folder, config, arguments.scheme)
    if (read_config(arguments.folder), stored_scheme(file)) != (config, arguments.scheme):
        raise ValueError(f"--folder: {arguments.folder} holds another checkpoint than --model, --blocks and --scheme say; name another")
    return file


def bounds(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds that no run can be faster than: of reading, and of the matrix products."""
    config = read_config(arguments.folder)
    inputs = make_inputs(config, arguments.size, arguments.length, "cpu")
    return {
        "reading": seconds_to_read(arguments.folder / f"{TRANSFORMER.weights}.safetensors"),
        "products": seconds_of_products(config, inputs, arguments.scheme, arguments.device) * arguments.steps,
    }


def inside(part: str, argv: Sequence[str], group: Group | None = None) -> dict[str, Any]:
    """What a process of its own finds, in `group` if there is one. Raises CalledProcessError when it ends with an error."""
    command = [sys.executable, "-m", "flux_lab.inference.full_size", *argv, f"--inside={part}"]
    command = group.command(command) if group else command
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ALLOCATOR).stdout)


def keep(result: dict[str, Any], file: Path) -> None:
    """Put a result into a file of results, in the place of an older one of the same run."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    results = [each for each in results if any(each[name] != result[name] for name in SAME_RUN)] + [result]
    write_json(file, results)


def machine(device: str) -> str:
    """What the numbers were taken on, in words."""
    cpu = f"{psutil.cpu_count()} {platform.machine()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB of memory"
    return f"{torch.cuda.get_device_name()}, {cpu}" if device == "cuda" else cpu


def describe(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    bound = max(result["reading"], result["products"])
    what = f"{arguments.scheme or 'bf16'}, {arguments.size} x {arguments.size} pixels, {arguments.steps} step(s), {arguments.device}"
    memory = ", ".join(f"{name} {gb(result[name])}" for name in ("resident", "reserved") if name in result)
    return (
        f"{what}: file {gb(result['file'])}, peak {memory}, limit {result['limit']} by {result['limit_by']}\n"
        f"run {result['seconds']:.1f} s = {result['seconds'] / bound:.2f} times the larger of reading and products"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is written")
    parser.add_argument("--model", choices=list(MODELS), default="dev", help="whose sizes to take (dev)")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="how many blocks of each kind (the model's own)")
    parser.add_argument("--scheme", choices=list(SCHEMES), help="quantized (bf16)")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (256)")
    parser.add_argument("--length", type=int, default=512, help="T5 tokens (512)")
    parser.add_argument("--steps", type=int, default=1, help="passes (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--resident", action="store_true", help="load all blocks instead of streaming them")
    parser.add_argument("--budget", default="2GB", help="for streamed weights (2GB)")
    parser.add_argument("--limit", help="such as 6GB: memory of the process, or of the GPU (none)")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file, with those of other runs")
    parser.add_argument("--inside", choices=(BOUNDS, GROUP, ALONE), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
