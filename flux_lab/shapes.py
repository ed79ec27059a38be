"""Run-time shape checks: the shape of every tensor is written in the signature, and checked there.

    @shaped
    def pack_latents(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens patch_channels"]: ...

An axis name means the same size everywhere in one call, a number exactly that size, `2*height` an expression of axes that are
already bound, `*batch` any number of axes. jaxtyping compares the axes and beartype walks unions, tuples and lists; this file
turns their verdict into one readable `ShapeError`, and offers the switch: `shapes.checks(enabled=False)`, or
FLUX_LAB_SHAPE_CHECKS=0 for a whole process.
"""

import contextlib
import contextvars
import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped

Function = TypeVar("Function", bound=Callable)
_enabled = contextvars.ContextVar("flux_lab_shape_checks", default=os.environ.get("FLUX_LAB_SHAPE_CHECKS", "1") != "0")


class ShapeError(ValueError):
    """A tensor is not what the signature says. Names the function, the argument, the axes expected and the shape that came."""


@contextlib.contextmanager
def checks(enabled: bool) -> Iterator[None]:
    """Turn the shape checks on or off inside a `with` block."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def shaped(function: Function) -> Function:
    """Check every tensor that goes into and comes out of `function` against its annotation.

    Raises ShapeError. Arguments without a tensor in their annotation are not checked.
    """
    signature = inspect.signature(function)
    names = tuple(signature.parameters)
    hints = _tensor_hints(signature)
    returns = signature.return_annotation if _axes_in(signature.return_annotation) else None

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        # Sizes are symbols while torch.compile traces: there is nothing to compare.
        if torch.compiler.is_compiling() or not _enabled.get():
            return function(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs  # too many, too few: the function itself says so
        with jaxtyped("context"):
            for name, hint in hints.items():
                if name in arguments and not _fits(arguments[name], hint):
                    raise ShapeError(_explain(function, f"argument `{name}`", arguments[name], hint, arguments, hints))
            result = function(*args, **kwargs)
            if returns is not None and not _fits(result, returns):
                raise ShapeError(_explain(function, "the result", result, returns, arguments, hints))
        return result

    return wrapper


def _fits(value: Any, hint: Any) -> bool:
    """One tensor is asked directly, which is quicker; beartype walks unions, tuples and lists."""
    return isinstance(value, hint) if isinstance(hint, type) else is_bearable(value, hint)


def _tensor_hints(signature: inspect.Signature) -> dict[str, Any]:
    """The parameters with a tensor in their annotation."""
    return {name: parameter.annotation for name, parameter in signature.parameters.items() if _axes_in(parameter.annotation)}


def _axes_in(annotation: Any) -> list[type[AbstractArray]]:
    """The jaxtyping annotations inside a (possibly nested) annotation."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return [annotation]
    return [found for inner in typing.get_args(annotation) for found in _axes_in(inner)]


def _explain(function: Callable, what: str, value: Any, hint: Any, arguments: dict[str, Any], hints: dict[str, Any]) -> str:
    """One line: which function, which argument, the axes expected with the sizes already bound, the shape that came."""
    sizes: dict[str, int | tuple[int, ...]] = {}
    for name, earlier in hints.items():
        if what == f"argument `{name}`":
            break
        sizes |= _bound_sizes(arguments.get(name), earlier)
    return f"{function.__qualname__}: {what}: expected {_expected(hint, sizes)}, got {_describe(value)}"


def _expected(hint: Any, sizes: dict[str, int | tuple[int, ...]]) -> str:
    """An annotation in words: `float [batch=2 tokens]`, tuples in parentheses, alternatives with "or"."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        axes = (f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in hint.dim_str.split())
        return f"{hint.__name__.partition('[')[0].lower()} [{' '.join(axes)}]"
    inner = [_expected(each, sizes) for each in typing.get_args(hint) if _axes_in(each)]
    return f"({', '.join(inner)})" if typing.get_origin(hint) is tuple else " or ".join(inner)


def _bound_sizes(value: Any, hint: Any) -> dict[str, int | tuple[int, ...]]:
    """Axis name -> size for one accepted tensor argument; an axis such as `*shape` stands for all that the others leave over."""
    for axes in _axes_in(hint):
        names = axes.dim_str.split()
        starred = [place for place, name in enumerate(names) if name.startswith("*")]
        if isinstance(value, torch.Tensor) and (value.ndim == len(names) or starred):
            sizes: list[int | tuple[int, ...]] = list(value.shape)
            for place in starred:
                many = slice(place, place + len(sizes) - len(names) + 1)
                sizes[many] = [tuple(sizes[many])]
            return {name: size for name, size in zip(names, sizes, strict=True) if name.lstrip("*").isidentifier() and name != "_"}
    return {}


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of ({', '.join(_describe(item) for item in value)})"
    return type(value).__name__
