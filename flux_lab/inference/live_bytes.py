"""How much memory tensors take: the bytes of all that are alive, counted after every operation.

What is counted is the same on every machine and for every allocator, and on the `meta` device too, where tensors have sizes and no
memory. Not counted are Python, the libraries' own buffers, and what an allocator keeps for later.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while its `with` block runs: `current` bytes are alive, `peak` is the largest number there has been.

    Every memory that an operation reads or makes counts, once, from then until it is freed; views count with what they look at. Only
    the memory of the tensors `ignored` never counts. With `meta`, the tensors of that device are counted, and no others. With `every`,
    `history` gets (second, bytes) after each so many operations.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), meta: bool = False, every: int | None = None):
        super().__init__()
        self.history: list[tuple[float, int]] = []
        self._every, self._operations = every, 0
        self._meta = meta
        self._ignored = {StorageWeakRef(tensor.untyped_storage()) for tensor in ignored}
        self._alive: dict[StorageWeakRef, int] = {}
        self._total = 0
        self.peak = 0

    @property
    def current(self) -> int:
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self._total = sum(self._alive.values())
        return self._total

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.is_meta == self._meta:
                self._see(tensor)
        # What has been freed is looked for only when it matters: the total without looking is never too small.
        if self._total > self.peak:
            self.peak = max(self.peak, self.current)
        self._operations += 1
        if self._every and self._operations % self._every == 0:
            self.history.append((time.perf_counter(), self.current))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in self._alive and reference not in self._ignored:
            self._alive[reference] = storage.nbytes()
            self._total += storage.nbytes()


class FusedAttention(TorchFunctionMode):
    """Lets attention on `meta` take what it takes on a CPU or GPU: fused kernels never hold the matrix of scores."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def bytes_of(*models: nn.Module) -> int:
    """The bytes of the parameters and buffers, those that are shared counted once."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({StorageWeakRef(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
