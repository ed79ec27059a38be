"""flux_lab.shapes: a wrong tensor gives one readable error, and the switch turns the checks off."""

import importlib
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from jaxtyping import Complex, Float
from torch import Tensor

import flux_lab
from flux_lab import shapes
from flux_lab.shapes import ShapeError, shaped


@shaped
def join(left: Float[Tensor, "batch dim"], right: Float[Tensor, "batch more"] | None = None, keep: int = 9) -> Float[Tensor, "batch 2*dim"]:
    return torch.cat([left, left if right is None else right], dim=1)[:, :keep]


class Layer(torch.nn.Module):
    @shaped
    def forward(self, x: Float[Tensor, "batch *places"]) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch *places"]]:
        return x, x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3),), "join: argument `left`: expected float [batch dim], got float32 [3]"),
        ((torch.zeros(2, 3).long(),), "join: argument `left`: expected float [batch dim], got int64 [2, 3]"),
        (([1, 2],), "join: argument `left`: expected float [batch dim], got list of (int, int)"),
        ((torch.zeros(2, 3), torch.zeros(4, 5)), "join: argument `right`: expected float [batch=2 more], got float32 [4, 5]"),
        ((torch.zeros(2, 3), None, 4), "join: the result: expected float [batch=2 2*dim], got float32 [2, 4]"),
    ],
)
def test_the_error_names_function_argument_axes_and_what_came(arguments, message):
    with pytest.raises(ShapeError) as caught:
        join(*arguments)
    assert str(caught.value) == message


def test_methods_are_named_with_their_class():
    with pytest.raises(ShapeError) as caught:
        Layer()(torch.zeros(2, 3))
    assert str(caught.value).startswith(
        "Layer.forward: the result: expected (float [batch=2], float [batch=2 *places=(3,)]), got tuple of (float32 [2, 3]"
    )


def test_right_tensors_pass():
    assert join(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2, 6)
    assert join(left=torch.zeros(2, 3), right=None).shape == (2, 6)


@shaped
def turn(x: Float[Tensor, "*shape width"], by: tuple[Float[Tensor, "width"], Float[Tensor, "width"]] | Complex[Tensor, "half"]):
    return x


@shaped
def blend(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"]):
    return first


def test_a_message_tells_tuples_from_alternatives_and_names_the_axes_of_a_star():
    with pytest.raises(ShapeError, match=re.escape("expected (float [width=4], float [width=4]) or complex [half], got float32 [4]")):
        turn(torch.zeros(2, 3, 4), torch.zeros(4))
    with pytest.raises(ShapeError, match=re.escape("expected float [*shape=(2, 3)], got float32 [2, 4]")):
        blend(torch.zeros(2, 3), torch.zeros(2, 4))


def test_the_switch_holds_inside_its_block_only():
    with shapes.checks(enabled=False):
        assert join(torch.zeros(2, 3), None, 4).shape == (2, 4)
        with shapes.checks(enabled=True), pytest.raises(ShapeError):
            join(torch.zeros(2, 3), None, 4)
    with pytest.raises(ShapeError):
        join(torch.zeros(2, 3), None, 4)


def test_the_environment_variable_turns_them_off(monkeypatch):
    monkeypatch.setenv("FLUX_LAB_SHAPE_CHECKS", "0")
    program = "from flux_lab import shapes; print(shapes._enabled.get())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "False"


CORE = [path.stem for path in Path(flux_lab.__file__).parent.glob("*.py") if not path.stem.startswith("_")]


def shaped_functions():
    """Every function and method of the core with a tensor in its signature that is checked, by its qualified name."""
    found = {}
    for name in CORE:
        module = importlib.import_module(f"flux_lab.{name}")
        owners = [module, *(value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__)]
        for owner in owners:
            for value in vars(owner).values():
                if inspect.isfunction(value) and value.__module__ == module.__name__ and SHAPED in unwrapped_codes(value):
                    found[value.__qualname__] = value
    return found


SHAPED = shaped(lambda: None).__code__


def unwrapped_codes(function):
    codes = []
    while function is not None:
        codes.append(function.__code__)
        function = getattr(function, "__wrapped__", None)
    return codes


def tensor_like(axes, extra=False):
    """A tensor that fits an annotation, with sizes that follow from the axes' names; with one axis too many if `extra`."""
    sizes = [int(axis) if axis.isdigit() else 2 + sum(map(ord, axis)) % 11 for axis in axes.dim_str.split() if not axis.startswith("*")]
    dtype = next(getattr(torch, name) for name in ("float32", "int64", "complex64") if name in axes.dtypes)
    return torch.zeros([*sizes, *([1, 1] if extra else [])], dtype=dtype)


def example(hint):
    """A value for an annotation: for the first alternative of a union, for every item of a tuple."""
    if typing.get_origin(hint) is tuple:
        return tuple(example(inner) for inner in typing.get_args(hint))
    axes = shapes._axes_in(hint)
    tuples = [inner for inner in typing.get_args(hint) if typing.get_origin(inner) is tuple]
    return example(tuples[0]) if tuples else tensor_like(axes[0])


def wrong(hint):
    """A tensor with an axis too many; where any number of axes fits, a bool tensor."""
    axes = shapes._axes_in(hint)[0]
    return torch.zeros(2, 2, dtype=torch.bool) if "*" in axes.dim_str else tensor_like(axes, extra=True)


CASES = [
    (name, parameter) for name, function in shaped_functions().items() for parameter in shapes._tensor_hints(inspect.signature(function))
]


@pytest.mark.parametrize(("name", "parameter"), CASES, ids=[".".join(case) for case in CASES])
def test_a_wrong_tensor_anywhere_is_named(name, parameter):
    function = shaped_functions()[name]
    signature = inspect.signature(function)
    hints = shapes._tensor_hints(signature)
    arguments = {other: None for other, value in signature.parameters.items() if value.default is value.empty and other not in hints}
    for other, hint in hints.items():
        arguments[other] = wrong(hint) if other == parameter else example(hint)
    with pytest.raises(ShapeError) as caught:
        function(**arguments)
    message = str(caught.value)
    shape = list(arguments[parameter].shape)
    assert message.startswith(f"{name}: argument `{parameter}`: expected ")
    assert message.endswith(f"got {str(arguments[parameter].dtype).removeprefix('torch.')} {shape}")


def test_there_are_many_of_them():
    assert len(CASES) > 50
