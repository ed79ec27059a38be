"""flux_lab.config: upstream's json in and out, presets with FLUX.1's sizes, and refusal of what we cannot honour."""

import dataclasses

import pytest
import torch

from flux_lab import config
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.clip import CLIPTextModel
from flux_lab.config import (
    FLUX_CLIP,
    FLUX_DEV,
    FLUX_MINI,
    FLUX_SCHNELL,
    FLUX_T5,
    FLUX_VAE,
    AutoencoderKLConfig,
    CLIPTextConfig,
    FlowMatchEulerDiscreteSchedulerConfig,
    FluxTransformer2DConfig,
    T5Config,
)
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

PRESETS = {name: value for name, value in vars(config).items() if isinstance(value, config.Config)}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_to_dict_and_back(preset):
    assert type(preset).from_dict(preset.to_dict()) == preset


@pytest.mark.parametrize(
    ("model", "preset", "parameters", "tensors"),
    [
        (FluxTransformer2DModel, FLUX_DEV, 11_901_408_320, 1160),
        (FluxTransformer2DModel, FLUX_SCHNELL, 11_891_178_560, 1156),
        (AutoencoderKL, FLUX_VAE, 83_819_683, 244),
        (CLIPTextModel, FLUX_CLIP, 123_060_480, 196),
        (T5EncoderModel, FLUX_T5, 4_762_310_656, 219),
    ],
)
def test_the_real_sizes(model, preset, parameters, tensors):
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in model(preset).parameters()]
    assert sum(sizes) == parameters
    assert len(sizes) == tensors


def test_the_miniature_has_the_real_anatomy():
    same = ("in_channels", "out_channels", "num_layers", "num_single_layers", "guidance_embeds")
    assert all(getattr(FLUX_MINI, name) == getattr(FLUX_DEV, name) for name in same)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (FluxTransformer2DConfig, "patch_size", 2),
        (AutoencoderKLConfig, "act_fn", "relu"),
        (AutoencoderKLConfig, "mid_block_add_attention", False),
        (AutoencoderKLConfig, "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        (CLIPTextConfig, "hidden_act", "gelu"),
        (T5Config, "feed_forward_proj", "relu"),
        (FlowMatchEulerDiscreteSchedulerConfig, "use_karras_sigmas", True),
        (FlowMatchEulerDiscreteSchedulerConfig, "invert_sigmas", True),
    ],
)
def test_a_setting_that_would_change_the_result_is_refused(kind, field, value):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: {field}="):
        kind.from_dict({field: value})


def test_a_setting_that_does_not_matter_is_ignored():
    assert FluxTransformer2DConfig.from_dict({"_diffusers_version": "0.42.1", "num_layers": 19}) == FLUX_SCHNELL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes_dims_rope": (16, 56, 58)}, "sums to 130, expected attention_head_dim=128"),
        ({"axes_dims_rope": (15, 57, 56)}, "expected even numbers"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FLUX_DEV, **change)


@pytest.mark.parametrize(
    ("field", "value"), [("sample_size", [128, 96]), ("sample_size", None), ("norm_num_groups", 0), ("layers_per_block", "2")]
)
def test_sizes_of_the_autoencoder_are_positive_integers(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.* is not supported, expected one positive integer"):
        AutoencoderKLConfig.from_dict({field: value})


def test_not_a_dict():
    with pytest.raises(TypeError, match="FluxTransformer2DConfig: expected a dict of configuration fields, got list"):
        FluxTransformer2DConfig.from_dict([])


def test_groups_and_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="128 is not a multiple of norm_num_groups=48"):
        AutoencoderKLConfig(norm_num_groups=48)
    with pytest.raises(ValueError, match="hidden_size=768 is not a multiple of num_attention_heads=11"):
        CLIPTextConfig(num_attention_heads=11)
    with pytest.raises(ValueError, match="hidden_size=768 is not a multiple of num_attention_heads=0"):
        CLIPTextConfig(num_attention_heads=0)
    with pytest.raises(ValueError, match="time_shift_type='cosine', expected 'exponential' or 'linear'"):
        FlowMatchEulerDiscreteSchedulerConfig(time_shift_type="cosine")
