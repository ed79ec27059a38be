"""Run a model that does not fit: each block gets its weights just before it computes and gives them back right after.

While one block computes, a thread fetches the next, from the files on disk (`streamed`) or from the CPU's memory (`offloaded`). At any
time the budget holds what no block has, the block that computes, and as many blocks ahead as fit. It works with hooks from outside; the
model's own code knows nothing of it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from flux_lab.checkpoints import check_device
from flux_lab.inference.budget import gb, parse_bytes
from flux_lab.inference.hoisting import Conditioning
from flux_lab.inference.loading import Read, assign, open_model, tensors_of
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

# Lists of blocks that run one after the other, and what of a block is used outside of it.
BLOCK_LISTS = {FluxTransformer2DModel: ("transformer_blocks", "single_transformer_blocks"), T5EncoderModel: ("encoder.block",)}
SHARED = "relative_attention_bias"


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> block, in the order in which they run. Raises ValueError for a model of another kind."""
    lists = next((names for kind, names in BLOCK_LISTS.items() if isinstance(model, kind)), None)
    if lists is None:
        raise ValueError(f"model: expected one of {[kind.__name__ for kind in BLOCK_LISTS]}, got {type(model).__name__}")
    return {f"{name}.{index}": block for name in lists for index, block in enumerate(model.get_submodule(name))}


class Streamer:
    """For a `with` block: hooks on the blocks of a model on `meta`, and the thread that fetches.

    `read` gives tensors on `device` by their names in the model. Raises ValueError when `budget`, in bytes, is too small.
    """

    def __init__(self, model: nn.Module, read: Read, device: torch.device | str, budget: int | None = None):
        self.model, self.read = model, read
        self.empty = tensors_of(model)
        self.blocks = [[name for name in self.empty if name.startswith(f"{block}.") and SHARED not in name] for block in blocks_of(model)]
        moving = {name for names in self.blocks for name in names}
        self.staying = [name for name in self.empty if name not in moving]
        self.ahead = self._blocks_ahead(budget)
        self.fetched: dict[int, Future[dict[str, Tensor]]] = {}
        self.side = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None

    def _blocks_ahead(self, budget: int | None) -> int:
        """How many blocks fit beside the one that computes. Without a budget one is enough to read and compute at the same time."""
        tables = sum(buffer.nbytes for buffer in self.model.buffers() if not buffer.is_meta)
        staying = tables + sum(self.empty[name].nbytes for name in self.staying)
        largest = max(sum(self.empty[name].nbytes for name in names) for names in self.blocks)
        if budget is not None and budget < staying + 2 * largest:
            raise ValueError(
                f"memory_budget: expected at least {gb(staying + 2 * largest)} to stream {type(self.model).__name__} ({gb(staying)} stay, "
                f"and twice the largest block of {gb(largest)}), got {gb(budget)}"
            )
        return 1 if budget is None else min((budget - staying) // largest, len(self.blocks)) - 1

    def __enter__(self) -> nn.Module:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self.hooks = []
        try:
            assign(self.model, self.read(self.staying))
            for index, block in enumerate(blocks_of(self.model).values()):
                self.hooks.append(block.register_forward_pre_hook(lambda *_, index=index: self._bring(index)))
                self.hooks.append(block.register_forward_hook(lambda *_, index=index: self._take_away(index), always_call=True))
        except BaseException:
            self.__exit__()
            raise
        return self.model

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.thread.shutdown(cancel_futures=True)
        self.fetched.clear()
        assign(self.model, self.empty)

    def _bring(self, index: int) -> None:
        self._fetch(index)
        assign(self.model, self.fetched.pop(index).result())
        for ahead in range(1, self.ahead + 1):
            self._fetch((index + ahead) % len(self.blocks))

    def _fetch(self, index: int) -> None:
        if index not in self.fetched:
            self.fetched[index] = self.thread.submit(self._read, index)

    def _read(self, index: int) -> dict[str, Tensor]:
        """In the thread. On CUDA with a queue of its own, or the copies would wait for the kernels of the blocks before."""
        if self.side is None:
            return self.read(self.blocks[index])
        with torch.cuda.stream(self.side):
            tensors = self.read(self.blocks[index])
        self.side.synchronize()
        return tensors

    def _take_away(self, index: int) -> None:
        if self.side is not None:  # the kernels may still be waiting: they need the weights until they have run
            torch.cuda.current_stream(self.side.device).synchronize()
        assign(self.model, {name: self.empty[name] for name in self.blocks[index]})


# ------------------------------------------------------------------------------------------------------------- from where


@contextlib.contextmanager
def streamed(
    folder: str | Path,
    memory_budget: int | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    conditionings: Sequence[Conditioning] = (),
) -> Iterator[nn.Module]:
    """A transformer or T5 whose weights stay in their files, for a `with` block: at most `memory_budget` of them is in memory.

    `folder` is that model's, in the diffusers layout, or as `save_quantized` wrote it. With `conditionings` its modulation is hoisted.
    Raises CheckpointError for a file that does not fit the configuration, ValueError when the budget is too small.
    """
    budget = parse_bytes(memory_budget)
    model, read = open_model(folder, device, dtype, conditionings, mapped=False)
    with Streamer(model, read, device, budget) as ready:
        yield ready


@contextlib.contextmanager
def offloaded(model: nn.Module, device: torch.device | str, memory_budget: int | str | None = None) -> Iterator[nn.Module]:
    """The model on `device`, for a `with` block, while its weights stay where they are: at most `memory_budget` of them is there."""
    check_device(device)
    budget, home = parse_bytes(memory_budget), tensors_of(model)
    if torch.device(device).type == "cuda":  # pages that the system cannot move are copied faster, and by the side
        home = {name: tensor.pin_memory() for name, tensor in home.items()}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        return {name: home[name].to(device, non_blocking=True, copy=True) for name in names}

    assign(model, {name: tensor.to("meta") for name, tensor in home.items()})
    try:
        with Streamer(model, read, device, budget) as ready:
            yield ready
    finally:
        assign(model, home)
