"""The memory planner: what a picture needs, stage by stage, before anything is downloaded.

The plan is the program itself, run on the `meta` device: the same modules, quantized by the same functions, called with inputs of the
right shapes, while `LiveBytes` counts. Only one thing is put in by hand, that attention is computed by a fused kernel.
"""

import dataclasses
from functools import lru_cache
from typing import Any

import torch

from flux_lab.checkpoints import empty_weights
from flux_lab.config import AutoencoderKLConfig
from flux_lab.inference.budget import device_memory, gb, parse_bytes
from flux_lab.inference.parts import MODELS, Parts
from flux_lab.inference.stages import SCHEME_OF_BITS, Stage, decode, denoise, encode
from flux_lab.latents import PATCH


class BudgetError(ValueError):
    """A plan needs more memory than there is. Says where, how much, and what would fit."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a picture needs in live tensor bytes. `repr` and notebooks show it as a table."""

    parts: Parts
    settings: dict
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def check(self, budget: int | str | None) -> None:
        """Raises BudgetError when the peak is above `budget`, such as "16GB"; None is no limit."""
        limit = parse_bytes(budget)
        if limit is None or self.peak <= limit:
            return
        worst = max(self.stages, key=lambda stage: stage.peak)
        raise BudgetError(
            f"memory_budget: expected at least {gb(self.peak)}, which stage {worst.name!r} needs ({gb(worst.weights)} of weights), "
            f"got {gb(limit)}; {self.suggestion(limit)}"
        )

    def suggestion(self, limit: int) -> str:
        """The least change of the settings with which the plan fits."""
        height, width = self.settings["height"], self.settings["width"]
        changes = [{"bits": bits} for bits in (8, 4) if bits < self.settings["bits"]]
        changes += [{"bits": 16, "stream": True}] if not self.settings["stream"] else []
        changes += [{"bits": 4, "stream": True, "batch": 1, "height": height // part, "width": width // part} for part in (1, 2)]
        for change in changes:
            other = plan(self.parts, **self.settings | change)
            if other.peak <= limit:
                changed = [f"{name}={value}" for name, value in change.items() if self.settings[name] != value]
                scheme = SCHEME_OF_BITS[other.settings["bits"]]
                return f"{', '.join(changed)} would need {gb(other.peak)}" + f" (quantize={scheme!r})" * (scheme is not None)
        return "quantizing, streaming and half the size would not do either"

    def rows(self) -> list[list[str]]:
        header = ["stage", "weights", "activations", "quantizing", "peak"]
        body = [[stage.name, *map(gb, (stage.weights, stage.activations, stage.loading, stage.peak))] for stage in self.stages]
        return [header, *body, ["whole", "", "", "", gb(self.peak)]]

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {str(value).removeprefix('torch.')}" for name, value in self.settings.items())
        lines = ["".join(cell.ljust(8) if column == 0 else cell.rjust(13) for column, cell in enumerate(row)) for row in self.rows()]
        return "\n".join([f"{self.parts.name}: {said}", *lines])

    def _repr_markdown_(self) -> str:
        lines = ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join([lines[0], "| --- | ---: | ---: | ---: | ---: |", *lines[1:]])


@torch.no_grad()
def plan(
    model: str | Parts = "dev",
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    bits: int = 16,
    steps: int = 28,
    hoisted: bool = True,
    stream: bool = False,
    negative: bool = False,
    length: int | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plan `batch` pictures with `bits` a weight of T5 and the transformer: 32, 16, 8 or 4.

    `model` is one of MODELS or a pipeline's Parts; height, width and the number of T5 tokens, `length`, default to its own. `hoisted`:
    without modulation weights in the loop. `stream`: blocks are read from disk, two at a time. `negative`: with true CFG. `dtype` is
    that of all that is not quantized: bf16, or fp32 with 32 bits. Raises ValueError for anything else.
    """
    parts = _parts(model)
    parts = dataclasses.replace(parts, length=length or parts.length)
    height, width = (_pixels(name, value, parts.vae) for name, value in (("height", height), ("width", width)))
    if bits not in SCHEME_OF_BITS:
        raise ValueError(f"bits: expected one of {list(SCHEME_OF_BITS)}, got {bits!r}")
    if min(batch, steps, parts.length) < 1:
        raise ValueError(f"batch, steps, length: expected at least 1, got {batch}, {steps} and {parts.length}")
    dtype = dtype or (torch.float32 if bits == 32 else torch.bfloat16)
    settings = {"height": height, "width": width, "batch": batch, "bits": bits, "steps": steps, "hoisted": hoisted, "stream": stream}
    settings |= {"negative": negative, "length": parts.length, "dtype": dtype}
    return Plan(parts, settings, _stages(parts, tuple(settings.items())))


@lru_cache(maxsize=64)
def _stages(parts: Parts, settings: tuple[tuple[str, Any], ...]) -> tuple[Stage, Stage, Stage]:
    """The same parts and settings are asked for again and again: by a pipeline's stages, and by whoever looks for what would fit."""
    with empty_weights():
        return encode(parts, dict(settings)), denoise(parts, dict(settings)), decode(parts, dict(settings))


def _parts(model: str | Parts) -> Parts:
    if isinstance(model, Parts):
        return model
    if model not in MODELS:
        raise ValueError(f"model: expected one of {list(MODELS)}, got {model!r}")
    return MODELS[model]


def _pixels(name: str, value: int | None, vae: AutoencoderKLConfig) -> int:
    patch = vae.vae_scale_factor * PATCH
    value = vae.sample_size if value is None else value
    if value < patch:
        raise ValueError(f"{name}: expected at least {patch} pixels, got {value}")
    return value // patch * patch


def report(model: str, device: str, budget: str | None, **settings: object) -> int:
    """Print the plan and whether it fits into `budget`, by default into the device's memory: the command `flux-lab plan`.

    Returns 0, or 1 when it does not fit.
    """
    limit = parse_bytes(budget) or device_memory(device)
    made = plan(model, **settings)
    where = "The budget" if budget else f"The memory of {device}"
    print(made)
    print(f"These are live tensor bytes; Python, torch and the GPU's driver come on top. {where} is {gb(limit)}: ", end="")
    if made.peak <= limit:
        print("it fits.")
        return 0
    print(f"it does not fit; {made.suggestion(limit)}.")
    return 1
