"""The doctor: versions, hardware, what fits into memory and whether the bundled miniature is whole, as text for a bug report.

No path in it goes above the repository or the home folder, and no user is named.
"""

import functools
import hashlib
import itertools
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from flux_lab import __version__, data_dir
from flux_lab.checkpoints import CheckpointError
from flux_lab.instruments.anatomy import FLUX_1_DEV, MINIATURE, Anatomy
from flux_lab.instruments.budget import MODELS, on_meta
from flux_lab.pipeline import FluxPipeline

PACKAGES = (
    *("torch", "numpy", "einops", "jaxtyping", "beartype", "safetensors", "pillow", "huggingface_hub", "diffusers", "transformers"),
    *("accelerate", "tokenizers", "sentencepiece", "jupyterlab", "ipywidgets", "matplotlib", "bitsandbytes"),
)
SETTINGS = ("FLUX_LAB_SHAPE_CHECKS", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
CHECKSUMS = "SHA256SUMS"
GIB = 2**30
# What a picture of 1024 pixels needs beside the weights: the decoder's last level holds a few feature maps of full size. Estimated.
ACTIVATIONS = 3 * GIB
# The models whose matrices are worth quantizing: they hold 98 % of FLUX.1's parameters.
QUANTIZED = ("transformer", "text_encoder_2")
# Among them T5's `wo` stays as it is.
KEPT = ".wo"
NF4_BLOCK, NESTED_BLOCK = 64, 256


def report() -> str:
    """All that a bug report needs to say about this machine, as plain text."""
    sections = {
        f"flux_lab {__version__}": software(),
        "Hardware": hardware(),
        "Bundled miniature": miniature(),
        "What fits into memory": fits(),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}".rstrip() for line in lines)]) for title, lines in sections.items())


# ---- versions -----------------------------------------------------------------------------------------------------------


def software() -> list[str]:
    named = [f"{name} {installed(name)}" for name in PACKAGES]
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return [
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}",
        *(", ".join(named[start : start + 6]) for start in range(0, len(named), 6)),
        f"settings: {', '.join(settings) or 'none'}",
    ]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


# ---- hardware -----------------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """A place to compute. `memory` in bytes: a GPU's own, the machine's for the CPU and for Apple's GPU."""

    name: str
    model: str
    memory: int


def devices() -> list[Device]:
    memory = psutil.virtual_memory().total
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    found = [Device("cpu", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}", memory)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Device(f"cuda:{index}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", memory))
    return found


def hardware() -> list[str]:
    memory = psutil.virtual_memory()
    return [
        *(f"{device.name}: {device.model}, {gib(device.memory)}" for device in devices()),
        f"threads: {torch.get_num_threads()} of torch, {psutil.cpu_count()} of the machine",
        f"memory: {gib(memory.available)} of {gib(memory.total)} free",
        f"disk: {gib(free_disk(Path.cwd()))} free here, {gib(free_disk(hub_cache()))} free where the hub's models go",
    ]


def hub_cache() -> Path:
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))


def free_disk(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


# ---- the bundled miniature ----------------------------------------------------------------------------------------------


def miniature() -> list[str]:
    """Whether it is there, can be read, and is the one that was published."""
    try:
        folder = data_dir() / "flux-mini"
        pipe = FluxPipeline.from_pretrained(folder)
    except (CheckpointError, OSError) as error:
        return [f"NOT USABLE: {shorten(str(error))}"]
    files = sorted(folder.rglob("*.safetensors"))
    parameters = sum(parameter.numel() for part in MODELS for parameter in getattr(pipe, part).parameters())
    size = sum(file.stat().st_size for file in files)
    return [f"{shorten(str(folder))}: {parameters:,} parameters, {gib(size)}, all read", *checksums(folder, files)]


def checksums(folder: Path, files: list[Path]) -> Iterator[str]:
    """The hash of each file of weights, against the published list if it is there."""
    published = {}
    if (folder / CHECKSUMS).is_file():
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        published = {name.strip(" *"): digest for digest, _, name in (line.partition(" ") for line in lines)}
    for file in files:
        name = file.relative_to(folder).as_posix()
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        verdict = f"no {CHECKSUMS} to compare with" if not published else "ok" if published.get(name) == digest else "DIFFERS"
        yield f"{name}: sha256 {digest[:12]}..., {verdict}"
    missing = published.keys() - {file.relative_to(folder).as_posix() for file in files}
    yield from (f"{name}: MISSING" for name in sorted(missing) if name.endswith(".safetensors"))


def shorten(text: str) -> str:
    """Paths without what is above the package, and without the home folder."""
    for folder, short in ((Path(__file__).resolve().parents[2], "..."), (Path.home(), "~")):
        text = text.replace(f"{folder}{os.sep}", f"{short}{os.sep}")
    return text


# ---- what fits ----------------------------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """What one model is made of: the rows and columns of every matrix worth quantizing, and how many other numbers there are."""

    matrices: list[tuple[int, int]]
    others: int


class Need(NamedTuple):
    """Bytes of weights of a pipeline: all of it, and the largest of its models alone."""

    name: str
    whole: int
    largest: int


def needs() -> list[Need]:
    """Computed from the configurations. The planner, `flux-lab plan`, counts real layers; a test holds these formulas to it."""
    small, real = numbers_of(MINIATURE), numbers_of(FLUX_1_DEV)
    return [
        need("miniature, float32", small, lambda rows, columns: 4 * rows * columns, 4),
        need("FLUX.1-dev, bfloat16", real, lambda rows, columns: 2 * rows * columns, 2),
        # One byte a number and one fp32 scale a row.
        need("FLUX.1-dev, 8-bit", real, lambda rows, columns: rows * columns + 4 * rows, 2),
        need("FLUX.1-dev, 4-bit", real, nf4_bytes, 2),
    ]


def nf4_bytes(rows: int, columns: int) -> int:
    """Half a byte a number, one byte for the scale of a block, one fp32 scale for a block of these, and one number for all."""
    blocks = ceil_div(rows * columns, NF4_BLOCK)
    return ceil_div(rows * columns, 2) + blocks + 4 * ceil_div(blocks, NESTED_BLOCK) + 4


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


@functools.cache
def numbers_of(anatomy: Anatomy) -> list[Numbers]:
    """Model by model."""
    counted = []
    for part in MODELS:
        model = on_meta(part, anatomy)
        linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and not name.endswith(KEPT)]
        matrices = [tuple(linear.weight.shape) for linear in linears if part in QUANTIZED]
        everything = sum(parameter.numel() for parameter in model.parameters())
        counted.append(Numbers(matrices, everything - sum(rows * columns for rows, columns in matrices)))
    return counted


def need(name: str, models: list[Numbers], bytes_of: Callable[[int, int], int], width: int) -> Need:
    """`bytes_of` a matrix of so many rows and columns; all other numbers take `width` bytes each."""
    sizes = [sum(itertools.starmap(bytes_of, model.matrices)) + width * model.others for model in models]
    return Need(name, sum(sizes), max(sizes))


def fits() -> list[str]:
    """A table: the weights of every pipeline, and on which device they fit."""
    places = devices()
    lines = [f"{'':24}{'weights':>10}{'largest':>10}" + "".join(f"{place.name:>10}" for place in places)]
    for pipeline in needs():
        verdicts = "".join(f"{verdict(pipeline, place.memory):>10}" for place in places)
        lines.append(f"{pipeline.name:24}{gib(pipeline.whole):>10}{gib(pipeline.largest):>10}{verdicts}")
    return [*lines, f"yes: all at once; by parts: one model after the other; each with {gib(ACTIVATIONS)} to spare for a picture"]


def verdict(pipeline: Need, memory: int) -> str:
    if pipeline.whole + ACTIVATIONS <= memory:
        return "yes"
    return "by parts" if pipeline.largest + ACTIVATIONS <= memory else "no"
