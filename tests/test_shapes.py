"""flux_lab.shapes: a wrong tensor gives one readable error, and the switch turns the checks off."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

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
        "Layer.forward: the result: expected float [batch=2], float [batch=2 *places], got tuple of (float32 [2, 3]"
    )


def test_right_tensors_pass():
    assert join(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2, 6)
    assert join(left=torch.zeros(2, 3), right=None).shape == (2, 6)


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
