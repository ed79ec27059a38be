"""The shapes of FLUX.1-dev beside the miniature's: the trace of a run on the `meta` device, which takes seconds and no memory."""

import re
from dataclasses import replace

import torch
from torch import Tensor

from flux_lab.instruments.anatomy import FLUX_1_DEV, MINIATURE, Anatomy
from flux_lab.instruments.budget import on_meta
from flux_lab.instruments.seams import Patterns, matcher
from flux_lab.instruments.table import Table
from flux_lab.instruments.trace import Trace, trace

ONE_OF_EACH = ("input/*", "embedded/*", "rope/*", "conditioning*", "double 00/*", "single 00/*", "last/*", "modulation/*", "velocity")


def trace_shapes(anatomy: Anatomy, only: Patterns | None = None, probabilities: bool = False) -> Trace:
    """One pass of the transformer without numbers: every tensor has its shape and is empty."""
    model = on_meta("transformer", anatomy)
    with trace(model, only=only, probabilities=probabilities) as recorded, torch.no_grad():
        model(**empty_inputs(anatomy))
    return recorded


def empty_inputs(anatomy: Anatomy) -> dict[str, Tensor | None]:
    """The transformer's arguments for one prompt and one picture of the checkpoint's own size, on the `meta` device."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in anatomy.shapes().items()}
    return {
        "hidden_states": empty["tokens"],
        "encoder_hidden_states": empty["prompt_embeds"],
        "pooled_projections": empty["pooled_prompt_embeds"],
        "timestep": empty["timestep"],
        "img_ids": empty["position_ids"][anatomy.length :],
        "txt_ids": empty["position_ids"][: anatomy.length],
        "guidance": empty["guidance"] if anatomy.transformer.guidance_embeds else None,
    }


def side_by_side(
    *anatomies: Anatomy | Trace, only: Patterns | None = ONE_OF_EACH, probabilities: bool = False, names: tuple[str, ...] = ()
) -> Table:
    """Name, axes and, for each anatomy, the shape of every tensor; by default of the miniature and of FLUX.1-dev.

    `only` names the tensors, by default those outside the blocks and those of the first block of each kind; None shows all. In place of
    an anatomy the trace of one pass will do; `names` are the headings, by default the anatomies' own. A tensor that a model does not
    have leaves its cell empty.
    """
    anatomies = anatomies or (MINIATURE, FLUX_1_DEV)
    headings = names or tuple(getattr(each, "name", f"trace {place}") for place, each in enumerate(anatomies, start=1))
    if len(headings) != len(anatomies):
        raise ValueError(f"names: expected {len(anatomies)} headings, one for each anatomy, got {len(headings)}")
    fits = matcher(only)
    traces = [each if isinstance(each, Trace) else trace_shapes(as_deep_as(each, only), probabilities=probabilities) for each in anatomies]
    axes = {name: " ".join(names) for recorded in reversed(traces) for name, names in recorded.axes.items() if fits(name)}
    ordered = dict.fromkeys(name for recorded in traces for name in recorded if name in axes)
    rows = [
        [f"`{name}`", axes[name], *(tuple(recorded[name].shape) if name in recorded else "" for recorded in traces)] for name in ordered
    ]
    return Table(["tensor", "axes", *headings], rows)


def as_deep_as(anatomy: Anatomy, only: Patterns | None) -> Anatomy:
    """The anatomy without the blocks behind the last one that `only` can name: they change no shape, and every block takes its time."""
    patterns = [only] if isinstance(only, str) else [""] if only is None else list(only)
    beginnings = [re.split(r"[*?[]", pattern)[0] for pattern in patterns]

    def depth(kind: str, count: int) -> int:
        names = [f"{kind} {index:02d}/" for index in range(count)]
        asked = [any(name.startswith(start) or start.startswith(name) for start in beginnings) for name in names]
        return max((place for place, is_asked in enumerate(asked, start=1) if is_asked), default=1)

    network = anatomy.transformer
    layers = {"num_layers": depth("double", network.num_layers), "num_single_layers": depth("single", network.num_single_layers)}
    return replace(anatomy, transformer=replace(network, **layers))
