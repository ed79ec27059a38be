"""Where two models part: both run on the same inputs, and the first operation whose outputs differ is named.

Modules are matched by their names, which here are upstream's. An operation whose outputs differ although its inputs agree is the
culprit; if its inputs differ already, what stands between it and the last operation that agreed is.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from flux_lab.instruments.seams import tensors_in

WHOLE = "(the whole model)"
ATTENTION = F.scaled_dot_product_attention.__name__
Key = tuple[str, int]
Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Summary:
    """One of two tensors that differ: shape, dtype, statistics, and its value where the difference is largest."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float
    std: float
    value: float | None

    def __str__(self) -> str:
        at = "" if self.value is None else f", there {self.value:.6g}"
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}, mean {self.mean:.4g}, std {self.std:.4g}{at}"


@dataclass(frozen=True)
class Divergence:
    """What `first_divergence` found. True when there is a difference.

    `name` is the culprit, and `operation` where its effect was first seen, with `after` the last operation before it that agreed:
    all None when nothing differs. `matched` counts the operations that agreed before.
    `output` is the differing tensor's place among `outputs`, `largest` the largest absolute difference and `where` its index (None when
    the shapes differ).
    """

    matched: int
    name: str | None = None
    operation: str | None = None
    after: str | None = None
    output: int = 0
    outputs: int = 1
    largest: float | None = None
    where: tuple[int, ...] | None = None
    ours: Summary | None = None
    reference: Summary | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def __str__(self) -> str:
        if not self:
            return f"no difference: all {self.matched} operations agree"
        which = f", output {self.output + 1} of {self.outputs}" if self.outputs > 1 else ""
        lines = [f"first difference: {self.name}{which if self.name == self.operation else ''}"]
        if self.name != self.operation:
            lines.append(f"  seen at     {self.operation}{which}, whose inputs differ already")
        if self.largest is not None:
            lines.append(f"  largest     {self.largest:.4g} at {list(self.where)}")
        lines += [f"  ours        {self.ours}", f"  reference   {self.reference}"]
        after = f", the last of them {self.after}" if self.after else ""
        return "\n".join([*lines, f"  before it   {self.matched} operations agreed{after}"])


@dataclass
class Call:
    """A module, or an attention product, while it runs: its name and how often it ran before."""

    name: str
    count: int
    inputs: list[Tensor]

    @property
    def key(self) -> Key:
        return self.name, self.count


class Found(Exception):
    """Ends our model's run at the first difference."""

    def __init__(self, divergence: Divergence):
        self.divergence = divergence


def first_divergence(
    ours: nn.Module, reference: nn.Module, inputs: Any, rtol: float = 1e-4, atol: float = 1e-5, run: Run | None = None
) -> Divergence:
    """Run the reference, then ours until the first operation whose outputs differ by more than atol + rtol * |reference|.

    `inputs`: keyword arguments as a mapping, positional ones as a tuple, or the one argument. `run(model, inputs)` calls the model,
    where that takes more than a plain call: `lambda vae, latents: vae.decode(latents)`. The reference's activations are kept meanwhile,
    and both models get copies of the inputs: operations in place change neither.
    Raises ValueError when the models have no module name in common.
    """
    names = [dict(model.named_modules()).keys() - {""} for model in (ours, reference)]
    if not names[0] & names[1]:
        raise ValueError("first_divergence: the models have no module name in common, so nothing can be matched")
    run, known = run or call, Reference()
    with torch.no_grad():
        with watched(reference, known, names[0]):
            run(reference, copied(inputs))
        comparison = Comparison(known.calls, rtol, atol)
        try:
            with watched(ours, comparison, names[1]):
                run(ours, copied(inputs))
        except Found as found:
            return found.divergence
    return Divergence(comparison.matched)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a mapping of keyword arguments, a tuple of positional ones, or one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def copied(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)


# ---- watching a run -----------------------------------------------------------------------------------------------------


class Copies:
    """Tensors as they are now: a later operation in place does not reach the copy. One that did not change is copied once."""

    def __init__(self):
        self.made = WeakTensorKeyDictionary()

    def of(self, value: Any) -> list[Tensor]:
        return [self.copy(tensor) for _, tensor in tensors_in(value)]

    def copy(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # counts no versions
            return tensor.detach().clone()
        version, copy = self.made.get(tensor, (None, None))
        if version != tensor._version:
            copy = tensor.detach().clone()
            self.made[tensor] = tensor._version, copy
        return copy


class Reference:
    """Remembers inputs and outputs of every call of the reference."""

    def __init__(self):
        self.calls: dict[Key, tuple[list[Tensor], list[Tensor]]] = {}

    def __call__(self, stack: list[Call], outputs: list[Tensor]) -> None:
        self.calls[stack[-1].key] = stack[-1].inputs, outputs


@dataclass
class Comparison:
    """Compares every call of ours with the reference's. Raises Found at the first that differs."""

    reference: dict[Key, tuple[list[Tensor], list[Tensor]]]
    rtol: float
    atol: float
    matched: int = 0
    after: str | None = None
    # Calls since the last that agreed which the reference does not have, with what they returned.
    unmatched: list[tuple[str, list[Tensor]]] = field(default_factory=list)

    def __call__(self, stack: list[Call], outputs: list[Tensor]) -> None:
        current = stack[-1]
        _, expected = self.reference.get(current.key, ([], None))
        # An attention product whose axes stand in another order is no difference, only nothing to compare.
        if expected is None or (current.name.endswith(ATTENTION) and outputs[0].shape != expected[0].shape):
            self.unmatched.append((current.name, outputs))
            return
        for place, (given, wanted) in enumerate(zip(outputs, expected, strict=False)):
            if not self.agree(given, wanted):
                self.report(stack, place, outputs, expected)
        self.matched, self.after = self.matched + 1, current.name
        self.unmatched.clear()

    def agree(self, given: Tensor, wanted: Tensor) -> bool:
        given, wanted = comparable(given, wanted)
        return given.shape == wanted.shape and torch.allclose(given, wanted, rtol=self.rtol, atol=self.atol, equal_nan=True)

    def report(self, stack: list[Call], place: int, outputs: list[Tensor], expected: list[Tensor]) -> None:
        given, wanted = comparable(outputs[place], expected[place])
        largest = where = None
        if given.shape == wanted.shape:
            # Where one of the two is not a number, that is the largest difference.
            same = (given == wanted) | (given.isnan() & wanted.isnan())
            difference = (given - wanted).abs().nan_to_num(nan=float("inf")).masked_fill(same, 0)
            where = tuple(int(axis) for axis in torch.unravel_index(difference.argmax(), difference.shape))
            largest = difference[where].item()
        raise Found(
            Divergence(
                matched=self.matched,
                name=self.culprit(stack) or WHOLE,
                operation=stack[-1].name or WHOLE,
                after=self.after,
                output=place,
                outputs=min(len(outputs), len(expected)),
                largest=largest,
                where=where,
                ours=summary(given, outputs[place].dtype, where),
                reference=summary(wanted, expected[place].dtype, where),
            )
        )

    def culprit(self, stack: list[Call]) -> str:
        """The innermost call whose inputs agree; or, if all that differs came out of one of ours that the reference lacks, that one."""
        if not (wrong := self.differing_inputs(stack[-1])):
            return stack[-1].name
        for name, outputs in self.unmatched:
            if all(any(same_numbers(tensor, output) for output in outputs) for tensor in wrong):
                return name
        return next((call.name for call in reversed(stack[:-1]) if call.key in self.reference and not self.differing_inputs(call)), "")

    def differing_inputs(self, call: Call) -> list[Tensor]:
        pairs = zip(call.inputs, self.reference[call.key][0], strict=False)
        return [given for given, wanted in pairs if not self.agree(given, wanted)]


@contextlib.contextmanager
def watched(model: nn.Module, finished: Callable[[list[Call], list[Tensor]], None], theirs: set[str]) -> Iterator[None]:
    """Call `finished(stack of running calls, outputs)` at the end of every module and attention product of `model`.

    `theirs`: the other model's module names. An attention product is named after the innermost module around it that both have.
    """
    stack: list[Call] = []
    counts: Counter[str] = Counter()
    copies = Copies()

    def begin(name: str, inputs: Any) -> None:
        stack.append(Call(name, counts[name], copies.of(inputs)))
        counts[name] += 1

    def end(outputs: Any) -> None:
        finished(stack, copies.of(outputs))
        stack.pop()

    class AttentionProducts(TorchFunctionMode):
        def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
            kwargs = kwargs or {}
            if getattr(function, "__name__", "") != ATTENTION:
                return function(*args, **kwargs)
            around = next((running.name for running in reversed(stack) if running.name in theirs), "")
            begin(f"{around}.{ATTENTION}".removeprefix("."), [args, kwargs])
            result = function(*args, **kwargs)
            end(result)
            return result

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            before = lambda module, args, kwargs, name=name: begin(name, [args, kwargs])  # noqa: E731
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(lambda module, args, result: end(result)).remove)
        hooks.enter_context(AttentionProducts())
        yield


# ---- comparing ----------------------------------------------------------------------------------------------------------


def comparable(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Both as real floating-point numbers of one dtype, without the leading axes of size 1 that only one of them has."""
    axes = min(given.ndim, wanted.ndim)
    given, wanted = (numbers(_without_leading_ones(tensor, axes)) for tensor in (given, wanted))
    dtype = torch.promote_types(given.dtype, wanted.dtype)
    return given.to(dtype), wanted.to(dtype)


def numbers(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.double() if tensor.dtype in (torch.float64, torch.int64) else tensor.float()


def _without_leading_ones(tensor: Tensor, axes: int) -> Tensor:
    while tensor.ndim > axes and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever order of axes."""
    return a.numel() == b.numel() and torch.equal(a.flatten().sort().values, b.flatten().sort().values)


def summary(tensor: Tensor, dtype: torch.dtype, where: tuple[int, ...] | None) -> Summary:
    value = None if where is None else tensor[where].item()
    return Summary(tuple(tensor.shape), dtype, tensor.mean().item(), tensor.std(correction=0).item(), value)
