"""The work of one pass, in floating-point operations (FLOPs), and where it is done: counted on the `meta` device, not computed.

A FLOP is one multiplication or one addition, so a product of matrices [a, b] and [b, c] takes 2 a b c. Only products and convolutions
count: normalisations and activations are thousands of times less. Source of the count: `torch.utils.flop_counter`.
"""

import dataclasses
import re
from collections import Counter
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flux_lab import shapes
from flux_lab.config import FLUX_SCHNELL, FLUX_SCHNELL_SCHEDULER
from flux_lab.instruments.anatomy import FLUX_1_DEV, Anatomy
from flux_lab.instruments.budget import on_meta
from flux_lab.instruments.side_by_side import empty_inputs

FLUX_1_SCHNELL = dataclasses.replace(
    FLUX_1_DEV, name="FLUX.1-schnell", transformer=FLUX_SCHNELL, scheduler=FLUX_SCHNELL_SCHEDULER, length=256
)

# Part of the transformer -> paths of its modules.
TRANSFORMER_PARTS = {
    "embedders, last layer": r"(x_embedder|context_embedder|norm_out|proj_out)\b",
    "conditioning": r"time_text_embed\.",
    "double: modulation": r"transformer_blocks\.\d+\.norm1(_context)?\.",
    "double: attention layers": r"transformer_blocks\.\d+\.attn\.(?!attend)",
    "double: MLP": r"transformer_blocks\.\d+\.ff",
    "single: modulation": r"single_transformer_blocks\.\d+\.norm\.",
    "single: attention layers": r"single_transformer_blocks\.\d+\.attn\.(?!attend)",
    # Its output layer serves attention and MLP together.
    "single: MLP": r"single_transformer_blocks\.\d+\.proj_",
    "attention product": r"(single_)?transformer_blocks\.\d+\.attn\.attend",
}


def part_of(path: str) -> str:
    """The part of the transformer that a module or a parameter belongs to. Raises ValueError for a path that fits none."""
    for part, pattern in TRANSFORMER_PARTS.items():
        if re.match(pattern, path):
            return part
    raise ValueError(f"path: expected a module or parameter of FLUX's transformer, got {path!r}")


def at_size(anatomy: Anatomy, pixels: int) -> Anatomy:
    """The same models, with pictures of `pixels` x `pixels`. Raises ValueError where whole tokens do not cover them."""
    if pixels < 1 or pixels % (anatomy.vae.vae_scale_factor * 2):
        raise ValueError(f"pixels: expected a multiple of {anatomy.vae.vae_scale_factor * 2}, got {pixels}")
    return dataclasses.replace(anatomy, vae=dataclasses.replace(anatomy.vae, sample_size=pixels))


@cache
def parameters_by_part(anatomy: Anatomy) -> dict[str, int]:
    """Part of the transformer -> number of its parameters."""
    counts = dict.fromkeys(TRANSFORMER_PARTS, 0)
    for path, parameter in on_meta("transformer", anatomy).named_parameters():
        counts[part_of(path)] += parameter.numel()
    return counts


def one_of_each(anatomy: Anatomy) -> Anatomy:
    """The same with one block of each kind: all blocks of a kind are alike, so one is enough to count."""
    return dataclasses.replace(anatomy, transformer=dataclasses.replace(anatomy.transformer, num_layers=1, num_single_layers=1))


@cache
def flops_by_part(anatomy: Anatomy) -> dict[str, int]:
    """Part of the transformer -> FLOPs of one pass for one picture of the anatomy's size."""
    model, counts = on_meta("transformer", one_of_each(anatomy)), Counter(dict.fromkeys(TRANSFORMER_PARTS, 0))
    inputs = empty_inputs(anatomy)
    blocks = {"transformer_blocks": anatomy.transformer.num_layers, "single_transformer_blocks": anatomy.transformer.num_single_layers}
    with shapes.checks(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    for path, flops in _flops_of_leaves(model, counter).items():
        counts[part_of(path)] += flops * blocks.get(path.split(".")[0], 1)
    return dict(counts)


def _flops_of_leaves(model: nn.Module, counter: FlopCounterMode) -> dict[str, int]:
    """FLOPs of the modules that hold no others, by path; the counter's names begin with the class."""
    counted, root = counter.get_flop_counts(), type(model).__name__
    leaves = [path for path, module in model.named_modules() if not list(module.children())]
    return {path: sum(counted[f"{root}.{path}"].values()) for path in leaves if f"{root}.{path}" in counted}


@cache
def pipeline_flops(anatomy: Anatomy) -> dict[str, int]:
    """Part of the pipeline -> FLOPs of one call of it for one picture: the transformer's is one pass, the VAE's is decoding."""
    sizes, meta = anatomy.shapes(), torch.device("meta")
    calls = {
        "text_encoder": lambda model: model(torch.zeros(sizes["clip_ids"], dtype=torch.long, device=meta)),
        "text_encoder_2": lambda model: model(torch.zeros(sizes["t5_ids"], dtype=torch.long, device=meta)),
        "vae": lambda model: model.decode(torch.empty(sizes["latents"], device=meta)),
    }
    counts = {}
    for part, call in calls.items():
        with shapes.checks(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(on_meta(part, anatomy))
        counts[part] = counter.get_total_flops()
    ordered = ("text_encoder", "text_encoder_2", "transformer", "vae")
    return {part: sum(flops_by_part(anatomy).values()) if part == "transformer" else counts[part] for part in ordered}
