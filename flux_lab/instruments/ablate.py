"""Turn a part of the model off, look at what is left, and have everything back afterwards.

with ablate(pipe, double=range(5, 10), heads={"single 03": [0, 2]}):
    without = pipe("a red cube")
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flux_lab.instruments.seams import Chunk, Passes, Patterns, View, arguments, matcher, replaced, seams
from flux_lab.pipeline import FluxPipeline
from flux_lab.transformer import FluxTransformer2DModel, named_blocks

STREAMS = ("text", "image")
Hook = Callable[..., Any]
Stack = contextlib.ExitStack


@contextlib.contextmanager
def ablate(
    target: FluxPipeline | FluxTransformer2DModel,
    *,
    double: int | Iterable[int] = (),
    single: int | Iterable[int] = (),
    heads: Mapping[str, int | Iterable[int]] | None = None,
    stream: str | Mapping[str, str] | None = None,
    gate: Patterns = (),
    clip: bool = False,
    t5: bool = False,
    swap_prompt: tuple[int, str] | None = None,
) -> Iterator[None]:
    """Inside the `with` block the transformer runs without the parts named.

    `double`, `single`: indices of blocks that hand both streams on unchanged; they are not computed at all.
    `heads`: block -> heads whose output is zero before the attention's output projection; the block is a pattern of names such as
    "double 07", "single *" or "*".
    `stream`: "text" or "image", in every block or by pattern of blocks: the stream passes the block unchanged, while the other still
    attends to it.
    `gate`: patterns of the gates' names, as `trace` has them, to set to zero: "double 07/modulation/image/mlp/gate".
    `clip`, `t5`: zeros in place of the pooled vector, of the words' vectors. That is no prompt at all; an empty prompt, which the model
    knows from training, is `pipe("")`.
    `swap_prompt`: (step, prompt): from this step on, counted from 0, both encoders are given this prompt; pipelines only. A negative
    prompt stays.

    What was changed is put back when the block is left, in whatever way. Raises ValueError and TypeError for what is not there.
    """
    model = target.transformer if isinstance(target, FluxPipeline) else target
    if not isinstance(model, FluxTransformer2DModel):
        raise TypeError(f"target: expected a FluxPipeline or its transformer, got {type(target).__name__}")
    blocks = named_blocks(model)
    with contextlib.ExitStack() as stack:
        for block in [*_chosen(model.transformer_blocks, double, "double"), *_chosen(model.single_transformer_blocks, single, "single")]:
            stack.enter_context(replaced(block, "forward", unchanged))
        for pattern, which in (heads or {}).items():
            _turn_off_heads(_matching(blocks, pattern, "heads"), which, stack)
        for pattern, which in _by_pattern(stream).items():
            _hold_stream(_matching(blocks, pattern, "stream"), which, stack)
        _close_gates(model, [gate] if isinstance(gate, str) else list(gate), stack)
        _zero_inputs(model, {"pooled_projections": clip, "encoder_hidden_states": t5}, stack)
        if swap_prompt is not None:
            _swap_prompt(target, swap_prompt, stack)
        yield


def unchanged(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """A block that does nothing: (text, image) as they came."""
    return encoder_hidden_states, hidden_states


# ---- what is meant ------------------------------------------------------------------------------------------------------


def _indices(which: int | Iterable[int], count: int, argument: str) -> list[int]:
    indices = [which] if isinstance(which, int) else list(which)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{argument}: expected whole numbers, got {index!r}")
        if not 0 <= index < count:
            raise ValueError(f"{argument}: there are {count}, expected 0 to {count - 1}, got {index}")
    return indices


def _chosen(blocks: nn.ModuleList, which: int | Iterable[int], argument: str) -> list[nn.Module]:
    return [blocks[index] for index in dict.fromkeys(_indices(which, len(blocks), argument))]


def _matching(blocks: Mapping[str, nn.Module], pattern: str, argument: str) -> dict[str, nn.Module]:
    fits = matcher(pattern)
    if not (found := {name: block for name, block in blocks.items() if fits(name)}):
        raise ValueError(f"{argument}: no block is named like {pattern!r}; the blocks are {next(iter(blocks))!r} to {list(blocks)[-1]!r}")
    return found


def _by_pattern(stream: str | Mapping[str, str] | None) -> Mapping[str, str]:
    by_pattern = {"*": stream} if isinstance(stream, str) else stream or {}
    for which in by_pattern.values():
        if which not in STREAMS:
            raise ValueError(f"stream: expected 'text' or 'image', got {which!r}")
    return by_pattern


# ---- turning off --------------------------------------------------------------------------------------------------------


def _after(module: nn.Module, hook: Hook, stack: Stack, **options: bool) -> None:
    # In front of every other hook, so that a trace sees what the model goes on with.
    stack.callback(module.register_forward_hook(hook, prepend=True, **options).remove)


def _turn_off_heads(blocks: Mapping[str, nn.Module], which: int | Iterable[int], stack: Stack) -> None:
    which = which if isinstance(which, int) else list(which)
    for name, block in blocks.items():
        indices = _indices(which, block.attn.heads, f"heads of {name!r}")

        def without(module: nn.Module, args: tuple, result: Tensor, indices: list[int] = indices) -> Tensor:
            result = result.clone()
            result[:, :, indices] = 0
            return result

        _after(block.attn.attend, without, stack)


def _hold_stream(blocks: Mapping[str, nn.Module], which: str, stack: Stack) -> None:
    def hold(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        given = arguments(module, args, kwargs)
        text, image = result
        return (given["encoder_hidden_states"], image) if which == "text" else (text, given["hidden_states"])

    for block in blocks.values():
        _after(block, hold, stack, with_kwargs=True)


def _close_gates(model: FluxTransformer2DModel, patterns: list[str], stack: Stack) -> None:
    gates = [(module, view) for module, views in seams(model) for view in views if view.name.endswith("/gate")]
    for pattern in patterns:
        fits = matcher(pattern)
        chosen = [(module, view) for module, view in gates if fits(view.name)]
        if not chosen:
            raise ValueError(f"gate: no gate is named like {pattern!r}; gates are {gates[0][1].name!r}, ..., {gates[-1][1].name!r}")
        for module, view in chosen:
            _after(module, _closing(view), stack)


def _closing(view: View) -> Hook:
    chunk: Chunk = view.pick

    def close(module: nn.Module, args: tuple, result: Tensor) -> Tensor:
        result = result.clone()
        chunk({}, result).zero_()
        return result

    return close


def _zero_inputs(model: FluxTransformer2DModel, off: Mapping[str, bool], stack: Stack) -> None:
    for argument in (name for name, is_off in off.items() if is_off):

        def empty(module: nn.Module, args: tuple, kwargs: dict[str, Any], argument: str = argument) -> tuple[tuple, dict[str, Any]]:
            given = arguments(module, args, kwargs)
            return (), given | {argument: torch.zeros_like(given[argument])}

        _before(model, empty, stack)


def _before(model: FluxTransformer2DModel, hook: Hook, stack: Stack) -> None:
    stack.callback(model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)


def _swap_prompt(pipe: FluxPipeline, swap: tuple[int, str], stack: Stack) -> None:
    if not isinstance(pipe, FluxPipeline):
        raise TypeError(f"swap_prompt: expected a FluxPipeline, which can encode a prompt, got {type(pipe).__name__}")
    if not isinstance(swap, tuple) or len(swap) != 2 or not isinstance(swap[0], int) or not isinstance(swap[1], str):
        raise TypeError(f"swap_prompt: expected (step, prompt), such as (3, 'a blue cone'), got {swap!r}")
    first, prompt = swap
    if first < 0:
        raise ValueError(f"swap_prompt: steps count from 0, got {first}")
    passes = Passes(pipe, stack)
    # The number of T5 tokens is known only when a run comes by.
    encode = functools.cache(lambda length: pipe.encode_prompt(prompt, max_sequence_length=length))

    def swapped(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        passes.update()
        if passes.index < first or passes.negative:
            return None
        given = arguments(module, args, kwargs)
        words = given["encoder_hidden_states"]
        text = encode(words.shape[1])
        pooled = text.pooled_prompt_embeds.expand(len(words), -1)
        return (), given | {"encoder_hidden_states": text.prompt_embeds.expand_as(words), "pooled_projections": pooled}

    _before(pipe.transformer, swapped, stack)
