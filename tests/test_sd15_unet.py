"""flux_lab.sd15.unet equals diffusers' UNet2DConditionModel, with and without a ControlNet's residuals."""

import pytest
import torch
from conftest import assert_parity
from diffusers import UNet2DConditionModel as ReferenceUNet
from sd15_parts import LIKE_SD15, UNETS, assert_same_gradients, make_inputs, make_residuals, make_unets

from flux_lab.sd15 import unet
from flux_lab.sd15.config import SD15_UNET, TINY_UNET
from flux_lab.sd15.unet import UNet2DConditionModel
from flux_lab.shapes import ShapeError


@pytest.mark.parametrize("residuals", [False, True], ids=["plain", "with residuals"])
@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_parity(config, residuals, dtype):
    ours, reference = make_unets(config, dtype)
    inputs = make_inputs(config, dtype=dtype)
    if residuals:
        inputs |= make_residuals(ours, inputs)
    assert_parity(ours(**inputs), reference(**inputs).sample)


@pytest.mark.parametrize("size", [(7, 5), (9, 12), (3, 2)], ids=str)
def test_sizes_that_do_not_halve(size, dtype):
    ours, reference = make_unets(LIKE_SD15, dtype)
    inputs = make_inputs(LIKE_SD15, size, dtype=dtype)
    assert_parity(ours(**inputs), reference(**inputs).sample)


@pytest.mark.parametrize("timestep", [0, 981, 12.5, torch.tensor(7), torch.tensor([7]), torch.tensor([0.3, 999.0])], ids=str)
def test_forms_of_the_timestep(timestep):
    ours, reference = make_unets(TINY_UNET)
    inputs = make_inputs(TINY_UNET) | {"timestep": timestep}
    assert_parity(ours(**inputs), reference(**inputs).sample)


def test_gradients():
    """Of all parameters of the smallest model, the residuals' way included."""
    ours, reference = make_unets(TINY_UNET)
    inputs = make_inputs(TINY_UNET)
    inputs |= make_residuals(ours, inputs)
    assert_same_gradients(ours, reference, lambda model: [model(**inputs) if model is ours else model(**inputs).sample])


def test_sizes_of_sd15():
    """Parameters, tensors and names of the real model, and its twelve skips at 512x512 pixels."""
    with torch.device("meta"):
        ours, reference = UNet2DConditionModel(SD15_UNET), ReferenceUNet.from_config(SD15_UNET.to_dict())
        inputs = {"sample": torch.empty(1, 4, 64, 64), "temb": torch.empty(1, 1280), "encoder_hidden_states": torch.empty(1, 77, 768)}
        skips = ours.run_down(**inputs)
    shapes, expected = ({name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, reference))
    assert shapes == expected
    assert len(shapes) == 686
    assert sum(shape.numel() for shape in shapes.values()) == 859_520_964
    assert [tuple(skip.shape[1:]) for skip in skips] == [
        *[(320, 64, 64)] * 3,
        *[(320, 32, 32), (640, 32, 32), (640, 32, 32)],
        *[(640, 16, 16), (1280, 16, 16), (1280, 16, 16)],
        *[(1280, 8, 8)] * 3,
    ]
    assert [skip.shape[1] for skip in skips] == unet.skip_channels(SD15_UNET)


def test_zero_residuals_change_nothing():
    ours, _ = make_unets(TINY_UNET)
    inputs = make_inputs(TINY_UNET)
    residuals = make_residuals(ours, inputs)
    zeros = {
        "down_block_additional_residuals": [torch.zeros_like(each) for each in residuals["down_block_additional_residuals"]],
        "mid_block_additional_residual": torch.zeros_like(residuals["mid_block_additional_residual"]),
    }
    assert torch.equal(ours(**inputs, **zeros), ours(**inputs))


def test_wrong_shapes():
    ours, _ = make_unets(TINY_UNET)
    good = make_inputs(TINY_UNET)
    residuals = make_residuals(ours, good)
    wrong = {
        r"argument `sample`: expected float \[batch .* got float32 \[4, 8, 12\]": {"sample": torch.ones(4, 8, 12)},
        r"argument `sample`: expected 4 channels, got \[2, 3, 8, 12\]": {"sample": torch.ones(2, 3, 8, 12)},
        r"argument `timestep`: expected .* got int64 \[3\]": {"timestep": torch.tensor([1, 2, 3])},
        r"argument `encoder_hidden_states`: .*batch=2.* got float32 \[1, 9, 10\]": {"encoder_hidden_states": torch.ones(1, 9, 10)},
        r"argument `encoder_hidden_states`: expected vectors of width 10, got \[2, 9, 11\]": {
            "encoder_hidden_states": torch.ones(2, 9, 11)
        },
        r"mid_block_additional_residual: number 0: expected \[2, 24, 2, 3\], got \[1, 24, 2, 3\]": residuals
        | {"mid_block_additional_residual": torch.ones(1, 24, 2, 3)},
        r"down_block_additional_residuals: number 1: expected \[2, 8, 8, 12\], got \[2, 8, 4, 6\]": residuals
        | {"down_block_additional_residuals": [residuals["down_block_additional_residuals"][i] for i in (0, 2, 1, 3, 4, 5)]},
    }
    for message, changed in wrong.items():
        with pytest.raises(ShapeError, match=message):
            ours(**(good | changed))


def test_clear_errors():
    ours, _ = make_unets(TINY_UNET)
    inputs = make_inputs(TINY_UNET)
    residuals = make_residuals(ours, inputs)
    for name, value in residuals.items():
        with pytest.raises(ValueError, match="give both or neither"):
            ours(**inputs, **{name: value})
    residuals["down_block_additional_residuals"].pop()
    with pytest.raises(ValueError, match="down_block_additional_residuals: expected 6 residuals, one a skip, got 5"):
        ours(**inputs, **residuals)
    with pytest.raises(ValueError, match="use_linear_projection=True is not supported"):
        UNet2DConditionModel.from_config({"use_linear_projection": True})


def _sines_first(timesteps, dim, embed=unet.get_timestep_embedding):
    return embed(timesteps, dim).roll(dim // 2, dims=-1)


def _residuals_twice(argument, states, residuals):
    return [state + 2 * residual for state, residual in zip(states, residuals, strict=True)]


@pytest.mark.parametrize(
    ("name", "bug"),
    [("get_timestep_embedding", _sines_first), ("add_residuals", _residuals_twice)],
    ids=["sines first", "residuals doubled"],
)
def test_planted_bugs_are_found(name, bug, monkeypatch):
    monkeypatch.setattr(unet, name, bug)
    with pytest.raises(AssertionError):
        test_parity(TINY_UNET, True, torch.float32)
