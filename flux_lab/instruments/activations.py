"""How much memory a pass of the transformer takes on top of its weights: the tensors that are alive at the worst moment, on `meta`."""

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_lab import shapes
from flux_lab.attention import Attend
from flux_lab.instruments.anatomy import Anatomy
from flux_lab.instruments.budget import on_meta
from flux_lab.instruments.seams import replaced
from flux_lab.instruments.side_by_side import empty_inputs
from flux_lab.instruments.work import one_of_each


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and nobody has let go of yet: `now`, and at the worst moment, `peak`.

    A view shares its bytes with the tensor that it is a view of. `known`: tensors that do not count, such as the weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        # Kept, so that no new storage can get the identity of one of them.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._alive = {id(storage) for storage in self._known}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._alive:
            return
        self._alive.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, id(storage), storage.nbytes())

    def _free(self, identity: int, size: int) -> None:
        self._alive.discard(identity)
        self.now -= size


def peak_activations(anatomy: Anatomy, dtype: torch.dtype = torch.bfloat16, fused: bool = True) -> int:
    """Bytes alive at the worst moment of one pass without gradients, inputs not counted. All blocks are alike, so one of each is run.

    `fused`: the attention product as one kernel, which never holds the matrix of probabilities; False: written out.
    """
    model = on_meta("transformer", one_of_each(anatomy)).to(dtype)
    inputs = {name: None if tensor is None else tensor.to(dtype) for name, tensor in empty_inputs(anatomy).items()}
    known = [*model.parameters(), *(tensor for tensor in inputs.values() if tensor is not None)]
    with contextlib.ExitStack() as stack, shapes.checks(False), torch.no_grad():
        for module in model.modules():
            if fused and isinstance(module, Attend):
                stack.enter_context(replaced(module, "forward", lambda query, key, value: torch.empty_like(query)))
        with LiveBytes(known) as live:
            model(**inputs)
    return live.peak
