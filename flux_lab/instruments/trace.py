"""Every named tensor of a run, recorded from outside by hooks: the model and its `forward` stay as they are.

with trace(pipe, only="*/attn/q") as t:
    pipe("a red cube")
t["step 03/double 07/attn/q"]
t.table(sort="-std")
"""

import contextlib
import difflib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flux_lab.instruments.seams import (
    PROBABILITIES,
    Passes,
    Patterns,
    View,
    arguments,
    join,
    matcher,
    place,
    result_axes,
    seams,
    tensors_in,
)
from flux_lab.instruments.table import Table
from flux_lab.pipeline import DenoisingState, FluxPipeline

LIMIT = 2**30
COLUMNS = ("name", "axes", "shape", "dtype", "mean", "std")
PACKED = "batch tokens patch_channels"


class TraceLimitError(RuntimeError):
    """More would be kept than the limit allows. Says which tensor, how much, and what to do."""


class Trace(Mapping[str, Tensor]):
    """Name -> tensor, in the order of the run. A later tensor of the same name takes the place of the earlier."""

    def __init__(self, only: Patterns | None, probabilities: bool, dtype: torch.dtype | None, device: str | None, limit: int):
        self.axes: dict[str, tuple[str, ...]] = {}
        self.bytes = 0
        self._tensors: dict[str, Tensor] = {}
        self._only = [only] if isinstance(only, str) else only if only is None else list(only)
        self._fits = matcher(self._only)
        self._probabilities, self._dtype, self._device, self._limit = probabilities, dtype, device, limit
        # What was computed but not kept, to help with names that are not there.
        self._passed: dict[str, None] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        if name in self._passed:
            raise KeyError(f"{name!r} was computed but not kept: trace(..., only=) did not name it, or probabilities=True is missing")
        raise KeyError(f"no tensor is named {name!r}; there is, for example, {self._near(str(name))}")

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Trace of {len(self):,} tensors, {in_mib(self.bytes)}; .table(filter=...) lists them"

    def _near(self, name: str) -> list[str]:
        """Names that look alike; some suffice."""
        known = list(itertools.islice(itertools.chain(self._tensors, self._passed), 3000))
        return difflib.get_close_matches(name, known, n=3, cutoff=0.3)

    def names(self, pattern: Patterns) -> list[str]:
        """The names that fit a pattern such as `*/attn/q`, in the order of the run."""
        fits = matcher(pattern)
        return [name for name in self if fits(name)]

    def table(self, sort: str | None = None, filter: Patterns | None = None) -> Table:
        """Name, axes, shape, dtype, mean and standard deviation of every tensor, or of those whose name fits `filter`.

        `sort`: a column's name, `-std` for the largest first; by default the order of the run. On the `meta` device there are no
        numbers, so mean and std stay empty, as they do for a tensor without elements; empty cells come last. Raises ValueError for an
        unknown column.
        """
        column = (sort or COLUMNS[0]).removeprefix("-")
        if column not in COLUMNS:
            raise ValueError(f"sort: expected one of {list(COLUMNS)}, with a minus for the largest first, got {sort!r}")
        rows = [self._row(name) for name in (self if filter is None else self.names(filter))]
        if sort is not None:
            index, reverse = COLUMNS.index(column), sort.startswith("-")
            rows.sort(key=lambda row: ((row[index] == "") != reverse, row[index]), reverse=reverse)
        return Table(COLUMNS, [[f"`{name}`", *cells] for name, *cells in rows])

    def _row(self, name: str) -> list[Any]:
        tensor = self._tensors[name]
        numbers = ["", ""]
        if not tensor.is_meta and tensor.numel():
            values = tensor.double()
            numbers = [float(f"{number.item():.4g}") for number in (values.mean(), values.std(correction=0))]
        return [name, " ".join(self.axes[name]), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), *numbers]

    def record(self, name: str, axes: str, make: Callable[[], Tensor]) -> None:
        """Keep a copy of a tensor, if it was asked for. Raises TraceLimitError."""
        asked = self._fits(name) and (self._probabilities or not name.endswith(PROBABILITIES))
        if not asked:
            self._passed[name] = None
            return
        tensor = make().detach()
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        # A meta tensor has no numbers that could go anywhere.
        device = tensor.device if tensor.is_meta or self._device is None else self._device
        size = 0 if tensor.is_meta else tensor.numel() * dtype.itemsize
        size -= self._bytes_of(name)
        if self.bytes + size > self._limit:
            raise TraceLimitError(
                f"trace: with {name!r} {in_mib(self.bytes + size)} would be kept, limit={self._limit} bytes ({in_mib(self._limit)}): "
                f"name what is needed with only=, e.g. only='*/image', or pass dtype=torch.bfloat16 or a larger limit"
            )
        # Always a copy: a view would keep its whole storage alive, and the original may be written to later.
        self._tensors[name] = tensor.to(device=device, dtype=dtype, copy=True)
        names = tuple(axes.split())
        self.axes[name] = names if len(names) == tensor.ndim else ()
        self.bytes += size

    def _bytes_of(self, name: str) -> int:
        before = self._tensors.get(name)
        return 0 if before is None or before.is_meta else before.nbytes

    def warn_of_unused_patterns(self) -> None:
        """A pattern that no tensor fits is mostly a slip of the pen."""
        for pattern in self._only or ():
            if (self._tensors or self._passed) and not self.names(pattern):
                message = f"only: no tensor of this run is named like {pattern!r}; there is, for example, {self._near(pattern)}"
                warnings.warn(message, stacklevel=4)


def in_mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


@contextlib.contextmanager
def trace(
    target: FluxPipeline | nn.Module,
    only: Patterns | None = None,
    probabilities: bool = False,
    dtype: torch.dtype | None = None,
    device: str | None = "cpu",
    limit: int = LIMIT,
) -> Iterator[Trace]:
    """Record what runs inside the `with` block.

    Of a pipeline's run every name begins with its step, counted from 0 as in `DenoisingState`: `step 03/double 07/attn/q`. There
    `step 03/velocity` is what the Euler step was given, under true CFG the combination of both passes, `step 03/x0` the picture that
    it aims at and `step 03/latents` where it arrived; the second pass of true CFG is found under `step 03/negative/`. A transformer,
    or a part of it, has the same names without the step. Any other module gives the results of all its parts under their paths.

    `only`: shell patterns of names to keep, such as `*/attn/q` or `step 00/*`. `probabilities` adds those of attention, computed
    from its queries and keys. `dtype` and `device` say how the copies are kept (None: as they come), `limit` how many bytes at most.
    Raises TypeError for another kind of target, TraceLimitError. Every hook is gone when the block is left, in whatever way.
    """
    if not isinstance(target, FluxPipeline | nn.Module):
        raise TypeError(f"target: expected a FluxPipeline or a torch module, got {type(target).__name__}")
    recorded = Trace(only, probabilities, dtype, device, limit)
    with contextlib.ExitStack() as stack:
        if isinstance(target, FluxPipeline):
            _follow_pipeline(target, recorded, stack)
        else:
            _hook(target, recorded, lambda: "", stack)
        yield recorded
    recorded.warn_of_unused_patterns()


def _follow_pipeline(pipe: FluxPipeline, recorded: Trace, stack: contextlib.ExitStack) -> None:
    def arrived(state: DenoisingState) -> None:
        for name in ("velocity", "x0", "latents"):
            recorded.record(f"step {state.index:02d}/{name}", PACKED, lambda name=name: getattr(state, name))

    passes = Passes(pipe, stack, arrived)
    stack.callback(pipe.transformer.register_forward_pre_hook(passes.update).remove)
    _hook(pipe.transformer, recorded, lambda: join(f"step {passes.index:02d}", "negative" if passes.negative else ""), stack)


def _hook(model: nn.Module, recorded: Trace, prefix: Callable[[], str], stack: contextlib.ExitStack) -> None:
    found = list(seams(model))
    for module, views in found:
        stack.callback(module.register_forward_hook(_look(views, recorded, prefix), with_kwargs=True).remove)
    for path, module in model.named_modules() if not found else ():
        stack.callback(module.register_forward_hook(_look_at_result(path, recorded)).remove)


def _look(views: tuple[View, ...], recorded: Trace, prefix: Callable[[], str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        given = arguments(module, args, kwargs)
        for view in views:
            recorded.record(join(prefix(), view.name), view.axes, lambda view=view: view.pick(given, result))

    return hook


def _look_at_result(path: str, recorded: Trace) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, result: Any) -> None:
        found = list(tensors_in(result))
        axes = result_axes(type(module))
        axes = axes if len(axes) == len(found) else ("",) * len(found)
        for (item, tensor), names in zip(found, axes, strict=True):
            recorded.record(join(place(path), item) or "result", names, lambda tensor=tensor: tensor)

    return hook
