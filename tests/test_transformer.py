"""flux_lab.transformer equals diffusers' FluxTransformer2DModel."""

import dataclasses

import pytest
import torch
from conftest import assert_parity, copy_weights, randomize_
from diffusers import FluxTransformer2DModel as Reference

from flux_lab.config import FLUX_MINI, TINY
from flux_lab.latents import prepare_latent_image_ids
from flux_lab.shapes import ShapeError
from flux_lab.transformer import FluxTransformer2DModel

CONFIGS = {
    "dev": TINY,
    "schnell": dataclasses.replace(TINY, guidance_embeds=False),
    "other sizes": dataclasses.replace(
        TINY, in_channels=12, out_channels=20, num_layers=1, num_single_layers=1, num_attention_heads=3, axes_dims_rope=(2, 6, 8)
    ),
}


def make_pair(config, dtype=torch.float32):
    reference = randomize_(Reference.from_config(config.to_dict())).to(dtype)
    ours = FluxTransformer2DModel.from_config(dict(reference.config))
    assert ours.config == config
    return copy_weights(ours, reference), reference


def make_inputs(config, dtype=torch.float32):
    return {
        "hidden_states": torch.randn(2, 15, config.in_channels).to(dtype),
        "encoder_hidden_states": torch.randn(2, 7, config.joint_attention_dim).to(dtype),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim).to(dtype),
        "timestep": torch.tensor([0.3, 0.71]).to(dtype),
        "img_ids": prepare_latent_image_ids(3, 5, dtype),
        "txt_ids": torch.zeros(7, 3, dtype=dtype),
        "guidance": torch.tensor([3.5, 1.0]) if config.guidance_embeds else None,
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parity(config, dtype):
    ours, reference = make_pair(config, dtype)
    inputs = make_inputs(config, dtype)
    assert_parity(ours(**inputs), reference(**inputs).sample)


def test_all_57_blocks():
    ours, reference = make_pair(FLUX_MINI)
    inputs = make_inputs(FLUX_MINI)
    exact = reference(**inputs).sample
    torch.testing.assert_close(ours(**inputs), exact, rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        halves = [model.to(dtype)(**make_half(inputs, dtype)) for model in (ours, reference)]
        given, wanted = halves[0].float(), halves[1].sample.float()
        own_error = (wanted - exact).norm()
        assert (given - exact).norm() <= 1.2 * own_error
        assert (given - wanted).norm() <= own_error


def make_half(inputs, dtype):
    return {name: value.to(dtype) if name != "guidance" else value for name, value in inputs.items()}


@pytest.mark.parametrize(("name", "value"), [("timestep", [0.31, 0.71]), ("guidance", [3.6, 1.0])])
def test_time_and_guidance_are_rounded_in_bfloat16_as_upstream(name, value):
    config = CONFIGS["dev"]
    ours, reference = make_pair(config, torch.bfloat16)
    inputs = make_inputs(config, torch.bfloat16) | {name: torch.tensor(value)}
    assert torch.equal(ours(**inputs), reference(**inputs).sample)


def test_a_planted_bug_is_noticed():
    config = CONFIGS["dev"]
    ours, reference = make_pair(config)
    inputs = make_inputs(config)
    for wrong in ({"timestep": 1 - inputs["timestep"]}, {"guidance": inputs["guidance"] * 1000}, {"img_ids": inputs["img_ids"].flip(1)}):
        with pytest.raises(AssertionError):
            assert_parity(ours(**inputs | wrong), reference(**inputs).sample)


def test_clear_errors():
    dev, schnell = (FluxTransformer2DModel(CONFIGS[name]) for name in ("dev", "schnell"))
    inputs = make_inputs(CONFIGS["dev"])
    with pytest.raises(ValueError, match="guidance: this model has a guidance embedding"):
        dev(**inputs | {"guidance": None})
    with pytest.raises(ValueError, match="guidance: this model has no guidance embedding"):
        schnell(**inputs)
    with pytest.raises(
        ShapeError, match=r"FluxTransformer2DModel.forward: argument `img_ids`: expected float \[tokens=15 axes\], got float32 \[16, 3\]"
    ):
        dev(**inputs | {"img_ids": torch.zeros(16, 3)})
