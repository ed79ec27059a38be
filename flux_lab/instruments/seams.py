"""Where a run can be looked into: the modules to hook, the name of every tensor that passes there, and its axes.

Names are places in the model: `double 07` and `single 30` are blocks, counted from 0; `double 07/image` is the image stream behind a
block, `double 07/attn/q` are its queries. `trace` reads these tensors, `ablate` turns some of them off.
"""

import contextlib
import fnmatch
import functools
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux_lab.attention import FluxAttention
from flux_lab.blocks import FluxSingleTransformerBlock, FluxTransformerBlock
from flux_lab.pipeline import DenoisingState, FluxPipeline
from flux_lab.transformer import FluxTransformer2DModel

Patterns = str | Iterable[str]
MISSING = object()


@dataclass(frozen=True)
class View:
    """One tensor at a seam: its name there, its axes, and how to take it from the call's arguments (by name) and result."""

    name: str
    axes: str
    pick: Callable[[dict[str, Any], Any], Tensor]


@dataclass(frozen=True)
class Seam:
    """What is seen when `child` of an `owner` has run; the child "" is the owner itself."""

    owner: type[nn.Module]
    child: str
    views: tuple[View, ...]


@dataclass(frozen=True)
class Argument:
    """Pick an argument of the call."""

    name: str

    def __call__(self, given: dict[str, Any], result: Any) -> Tensor:
        return given[self.name]


@dataclass(frozen=True)
class Result:
    """Pick the result of the call, or one of its items."""

    item: int | None = None

    def __call__(self, given: dict[str, Any], result: Any) -> Tensor:
        return result if self.item is None else result[self.item]


@dataclass(frozen=True)
class Chunk:
    """Pick one of several signals that a linear layer computes side by side."""

    index: int
    count: int

    def __call__(self, given: dict[str, Any], result: Tensor) -> Tensor:
        return result.chunk(self.count, dim=1)[self.index]


def attention_probabilities(given: dict[str, Any], result: Tensor) -> Tensor:
    """softmax(q k / sqrt(head_dim)) in float32, [batch, heads, sequence, sequence]: a row for every query sums to 1."""
    query, key = given["query"].float(), given["key"].float()
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1)


def signals(*names: str) -> tuple[View, ...]:
    """The modulation signals of one linear layer, in the order in which it computes them."""
    return tuple(View(f"modulation/{name}", "batch dim", Chunk(index, len(names))) for index, name in enumerate(names))


def signals_of(stream: str) -> tuple[View, ...]:
    """The six signals of one stream of a double-stream block."""
    return signals(*(f"{stream}/{layer}/{signal}" for layer in ("attn", "mlp") for signal in ("shift", "scale", "gate")))


HEADS, IMAGE, TEXT, SEQUENCE = "batch sequence heads head_dim", "batch tokens dim", "batch length dim", "batch sequence dim"
PROBABILITIES = "probabilities"
STREAMS = (View("text", TEXT, Result(0)), View("image", IMAGE, Result(1)))
SEAMS = (
    Seam(
        FluxTransformer2DModel,
        "",
        (
            View("input/latents", "batch tokens patch_channels", Argument("hidden_states")),
            View("input/prompt_embeds", "batch length joint_dim", Argument("encoder_hidden_states")),
            View("input/pooled_prompt_embeds", "batch pooled_dim", Argument("pooled_projections")),
            View("velocity", "batch tokens patch_channels", Result()),
        ),
    ),
    Seam(FluxTransformer2DModel, "x_embedder", (View("embedded/image", IMAGE, Result()),)),
    Seam(FluxTransformer2DModel, "context_embedder", (View("embedded/text", TEXT, Result()),)),
    Seam(
        FluxTransformer2DModel,
        "pos_embed",
        (View("rope/cos", "sequence head_dim", Result(0)), View("rope/sin", "sequence head_dim", Result(1))),
    ),
    Seam(FluxTransformer2DModel, "time_text_embed.timestep_embedder", (View("conditioning/time", "batch dim", Result()),)),
    Seam(FluxTransformer2DModel, "time_text_embed.guidance_embedder", (View("conditioning/guidance", "batch dim", Result()),)),
    Seam(FluxTransformer2DModel, "time_text_embed.text_embedder", (View("conditioning/pooled", "batch dim", Result()),)),
    Seam(FluxTransformer2DModel, "time_text_embed", (View("conditioning", "batch dim", Result()),)),
    # The last layer's two signals come the other way round.
    Seam(FluxTransformer2DModel, "norm_out.linear", signals("last/scale", "last/shift")),
    Seam(FluxTransformer2DModel, "norm_out", (View("last/image", IMAGE, Result()),)),
    Seam(FluxTransformerBlock, "", STREAMS),
    Seam(FluxTransformerBlock, "norm1.linear", signals_of("image")),
    Seam(FluxTransformerBlock, "norm1_context.linear", signals_of("text")),
    Seam(FluxTransformerBlock, "attn", (View("attn/image", IMAGE, Result(0)), View("attn/text", TEXT, Result(1)))),
    Seam(FluxTransformerBlock, "ff", (View("mlp/image", IMAGE, Result()),)),
    Seam(FluxTransformerBlock, "ff_context", (View("mlp/text", TEXT, Result()),)),
    Seam(FluxSingleTransformerBlock, "", STREAMS),
    Seam(FluxSingleTransformerBlock, "norm.linear", signals("shift", "scale", "gate")),
    Seam(FluxSingleTransformerBlock, "act_mlp", (View("mlp/hidden", "batch sequence hidden", Result()),)),
    Seam(FluxSingleTransformerBlock, "proj_out", (View("update", SEQUENCE, Result()),)),
    Seam(
        FluxAttention,
        "rope",
        (
            View("q", HEADS, Argument("query")),
            View("k", HEADS, Argument("key")),
            View("q_rope", HEADS, Result(0)),
            View("k_rope", HEADS, Result(1)),
        ),
    ),
    Seam(
        FluxAttention,
        "attend",
        (
            View("v", HEADS, Argument("value")),
            View(PROBABILITIES, "batch heads sequence sequence", attention_probabilities),
            View("attended", HEADS, Result()),
        ),
    ),
)


# ---- places -------------------------------------------------------------------------------------------------------------


def place(path: str) -> str:
    """A module's path as lessons call it: `transformer_blocks.7.attn` is `double 07/attn`."""
    path = re.sub(r"\bsingle_transformer_blocks\.(\d+)", lambda found: f"single {int(found[1]):02d}", path)
    path = re.sub(r"\btransformer_blocks\.(\d+)", lambda found: f"double {int(found[1]):02d}", path)
    return path.replace(".", "/")


def join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def seams(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[View, ...]]]:
    """Every module of `model` that FLUX's tensors can be seen at, and the views there with their full names."""
    for path, owner in model.named_modules():
        for seam in SEAMS:
            child = _descendant(owner, seam.child) if isinstance(owner, seam.owner) else None
            if child is not None:
                yield child, tuple(View(join(place(path), view.name), view.axes, view.pick) for view in seam.views)


def _descendant(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def matcher(patterns: Patterns | None) -> Callable[[str], bool]:
    """Whether a name fits one of the shell patterns; `*` also stands for slashes. None fits all."""
    if patterns is None:
        return lambda name: True
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"expected a pattern such as '*/attn/q', or several, got {patterns!r}")
    expressions = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    return lambda name: any(expression.match(name) for expression in expressions)


# ---- any other module ---------------------------------------------------------------------------------------------------


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a result, from the first to the last: in tuples, lists and mappings too, each with the name of its place there."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    else:
        return
    for key, item in items:
        yield from tensors_in(item, join(name, str(key)))


@functools.cache
def result_axes(kind: type[nn.Module]) -> tuple[str, ...]:
    """The axes of what a module returns, as its `forward` is annotated; empty where it is not."""
    returns = inspect.signature(kind.forward).return_annotation
    return tuple(getattr(each, "dim_str", "") for each in (typing.get_args(returns) or (returns,)))


# ---- for hooks ----------------------------------------------------------------------------------------------------------


def arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by their names."""
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return {name: value for name, value in given.items() if name != "self"}


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put `value` in the place of an object's method, and take it away afterwards."""
    before = vars(owner).get(name, MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is MISSING else setattr(owner, name, before)


class Passes:
    """Which denoising step the transformer is in, `index`, and whether this is true CFG's second pass, `negative`, until `stack` is closed.

    `update` comes before every pass, `arrived` is called after every step. Several generations may be under way at the same time.
    """

    def __init__(self, pipe: FluxPipeline, stack: contextlib.ExitStack, arrived: Callable[[DenoisingState], None] = lambda state: None):
        self.index, self.count, self.open = 0, 0, True
        steps, passes = type(pipe).steps, self

        def watched(self: FluxPipeline, *args: Any, **kwargs: Any) -> Iterator[DenoisingState]:
            states = steps(self, *args, **kwargs)
            if self is not pipe:
                yield from states
                return
            for index in itertools.count():
                passes.index, passes.count = index, 0
                state = next(states, None)
                if state is None:
                    return
                if passes.open:  # a generation may outlive the stack
                    arrived(state)
                yield state

        # The method of the class: a copy of the pipeline would take the object's own along.
        stack.enter_context(replaced(type(pipe), "steps", watched))
        stack.callback(setattr, self, "open", False)

    @property
    def negative(self) -> bool:
        return self.count > 1

    def update(self, *_: Any) -> None:
        self.count += 1
