"""Proof at full size without the real weights: a transformer of random numbers, run from disk under a memory limit.

    python -m flux_lab.inference.full_size --folder /big/disk/bf16 --limit 6GB
    python -m flux_lab.inference.full_size --folder /big/disk/nf4 --scheme nf4 --device cuda --resident --size 1024 --steps 20 --limit 16GB

Three numbers are taken: the time to read the file with a cold page cache, the time of the bare matrix products, and the time of the run,
which cannot be shorter than the larger of the two, with its peak memory. The limit is the operating system's for the CPU (RLIMIT_AS: all
addresses of the process, so all that is resident, mapped pages too), and the allocator's for CUDA.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_lab.checkpoints import TRANSFORMER
from flux_lab.config import FluxTransformer2DConfig
from flux_lab.inference.budget import gb, parse_bytes
from flux_lab.inference.int8 import integer_product
from flux_lab.inference.loading import load_lean
from flux_lab.inference.parts import MODELS
from flux_lab.inference.quantization import SCHEMES, stored_scheme
from flux_lab.inference.random_checkpoint import on_meta, write_random
from flux_lab.inference.streaming import streamed
from flux_lab.latents import PATCH, prepare_latent_image_ids
from flux_lab.transformer import TIME_SCALE

CHUNK = 2**23


# ------------------------------------------------------------------------------------------------------------- what limits the speed


def seconds_to_read(file: Path) -> float:
    """Read the file once, from a cold page cache where the system can be asked to empty it."""
    make_cold(file)
    start, buffer = time.perf_counter(), bytearray(CHUNK)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return time.perf_counter() - start


def make_cold(file: Path) -> None:
    """Ask the system to forget the file's pages."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def seconds_of_products(config: FluxTransformer2DConfig, inputs: dict[str, Tensor], scheme: str | None, device: str) -> float:
    """The matrix products of one pass and nothing else: each shape is timed once and counted as often as it occurs.

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
        total += count * _timed(lambda: product(x, weight), device)  # noqa: B023
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
    set_limit(parse_bytes(arguments.limit), arguments.device)
    start, seconds = time.perf_counter(), []
    inputs = make_inputs(read_config(arguments.folder), arguments.size, arguments.length, arguments.device)
    times = [torch.tensor([1 - step / arguments.steps]).bfloat16().to(arguments.device) for step in range(arguments.steps)]
    guidance = [inputs["guidance"].bfloat16() * TIME_SCALE] if "guidance" in inputs else []
    conditionings = [(each * TIME_SCALE, *guidance, inputs["pooled_projections"]) for each in times]
    with open_transformer(arguments, conditionings) as transformer:
        seconds.append(time.perf_counter() - start)
        for each in times:
            seconds.append(_timed(lambda: inputs.update(hidden_states=transformer(**inputs | {"timestep": each})), arguments.device))  # noqa: B023
    finite = bool(inputs["hidden_states"].isfinite().all())
    return {"seconds": time.perf_counter() - start, "opening": seconds[0], "steps": seconds[1:], "finite": finite} | peak(arguments.device)


def open_transformer(arguments: argparse.Namespace, conditionings: list[tuple[Tensor, ...]]) -> Any:
    """The transformer for a `with` block: streamed, or all of it in memory."""
    if arguments.resident:
        return contextlib.nullcontext(load_lean(arguments.folder, device=arguments.device, conditionings=conditionings))
    return streamed(arguments.folder, arguments.budget, arguments.device, conditionings=conditionings)


def set_limit(limit: int | None, device: str) -> None:
    """Let the operating system, or CUDA's allocator, refuse more than `limit` bytes."""
    if limit is not None and device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    elif limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


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
    arguments = build_parser().parse_args(argv)
    if arguments.inside:
        print(json.dumps(run(arguments)))
        return 0
    config = MODELS[arguments.model].transformer
    if arguments.blocks:
        config = dataclasses.replace(config, num_layers=arguments.blocks[0], num_single_layers=arguments.blocks[1])
    file = arguments.folder / f"{TRANSFORMER.weights}.safetensors"
    if not file.exists():
        write_random(arguments.folder, config, arguments.scheme)
    if (read_config(arguments.folder), stored_scheme(file)) != (config, arguments.scheme):
        raise ValueError(f"--folder: {arguments.folder} holds another checkpoint than --model, --blocks and --scheme say; name another")
    inputs = make_inputs(config, arguments.size, arguments.length, "cpu")
    limits = {
        "reading": seconds_to_read(file),
        "products": seconds_of_products(config, inputs, arguments.scheme, arguments.device) * arguments.steps,
    }
    make_cold(file)
    # The limit is set in a process of its own, with two arenas: addresses that nobody uses would count.
    command = [sys.executable, "-m", "flux_lab.inference.full_size", "--inside", *(argv if argv is not None else sys.argv[1:])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "2"})
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    result = {"file": file.stat().st_size, "limit": arguments.limit, **limits, **json.loads(done.stdout.splitlines()[-1])}
    print(describe(arguments, result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


def describe(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    bound = max(result["reading"], result["products"])
    what = f"{arguments.scheme or 'bf16'}, {arguments.size} x {arguments.size} pixels, {arguments.steps} step(s), {arguments.device}"
    memory = ", ".join(f"{name} {gb(result[name])}" for name in ("resident", "reserved") if name in result)
    return (
        f"{what}: file {gb(result['file'])}, peak {memory}, limit {result['limit']}\n"
        f"reading alone {result['reading']:.1f} s, matrix products alone {result['products']:.1f} s, "
        f"run {result['seconds']:.1f} s = {result['seconds'] / bound:.2f} times the larger"
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
    parser.add_argument("--json", type=Path, help="keep the numbers here")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
