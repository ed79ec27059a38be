"""flux_lab.sd15.config reads and writes diffusers' configs, and refuses what we cannot honour."""

import dataclasses
import inspect

import pytest
from diffusers import DDPMScheduler, PNDMScheduler, UNet2DConditionModel

from flux_lab.sd15.config import (
    MINI_UNET,
    SD15_DDPM,
    SD15_PNDM,
    SD15_UNET,
    TINY_UNET,
    DDPMSchedulerConfig,
    PNDMSchedulerConfig,
    UNet2DConditionConfig,
)

REFERENCES = {UNet2DConditionConfig: UNet2DConditionModel, PNDMSchedulerConfig: PNDMScheduler, DDPMSchedulerConfig: DDPMScheduler}
# As the published checkpoint has it.
SD15_JSON = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


def defaults_of(reference):
    return {name: parameter.default for name, parameter in inspect.signature(reference.__init__).parameters.items()}


@pytest.mark.parametrize("kind", REFERENCES)
def test_defaults_are_upstreams(kind):
    upstream = defaults_of(REFERENCES[kind])
    for field in dataclasses.fields(kind):
        assert field.default == upstream[field.name], field.name
    for name, allowed in kind.SUPPORTED.items():
        assert upstream[name] in allowed, name


@pytest.mark.parametrize("kind", REFERENCES)
def test_every_upstream_field_is_ours_or_checked(kind):
    """A field that is neither would be ignored, whatever its value: only those that change nothing may be."""
    ours = {field.name for field in dataclasses.fields(kind)} | set(kind.SUPPORTED)
    harmless = {"self", "args", "kwargs", "dynamic_thresholding_ratio", "sample_max_value", "addition_time_embed_dim"}
    harmless |= {"addition_embed_type_num_heads", "projection_class_embeddings_input_dim"}
    assert set(defaults_of(REFERENCES[kind])) - ours - harmless == set()


@pytest.mark.parametrize("config", [SD15_UNET, MINI_UNET, TINY_UNET, SD15_PNDM, SD15_DDPM], ids=lambda config: config.CLASS_NAME)
def test_there_and_back(config):
    assert type(config).from_dict(config.to_dict()) == config
    if config is not SD15_UNET:
        assert type(config).from_dict(dict(REFERENCES[type(config)].from_config(config.to_dict()).config)) == config


def test_the_published_config_is_the_preset():
    assert UNet2DConditionConfig.from_dict(SD15_JSON) == SD15_UNET
    assert (SD15_UNET.heads, SD15_UNET.time_embed_dim) == (8, 1280)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (UNet2DConditionConfig, {"use_linear_projection": True}, "use_linear_projection=True is not supported"),
        (UNet2DConditionConfig, {"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        (UNet2DConditionConfig, {"attention_head_dim": [5, 10, 20, 20]}, r"attention_head_dim=\(5, 10, 20, 20\) is not supported, .* one"),
        (UNet2DConditionConfig, {"layers_per_block": 0}, "layers_per_block=0 is not supported, expected one positive integer"),
        (UNet2DConditionConfig, {"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 blocks, expected 4"),
        (UNet2DConditionConfig, {"up_block_types": ["AttnUpBlock2D"] * 4}, "up_block_types: 'AttnUpBlock2D' is not supported"),
        (UNet2DConditionConfig, {"block_out_channels": [320, 640, 1280, 1290]}, "1290 is not a multiple of norm_num_groups=32"),
        (
            UNet2DConditionConfig,
            {"norm_num_groups": 4, "block_out_channels": [8, 12, 8, 8]},
            "12 is not a multiple of attention_head_dim=8",
        ),
        (UNet2DConditionConfig, {"norm_num_groups": 1, "block_out_channels": [9, 8, 8, 8]}, "half cosines, expected an even number"),
        (PNDMSchedulerConfig, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2' is not supported"),
        (PNDMSchedulerConfig, {"trained_betas": [0.1, 0.2]}, "trained_betas=0.1 is not supported"),
        (PNDMSchedulerConfig, {"prediction_type": "sample"}, "prediction_type='sample' is not supported"),
        (DDPMSchedulerConfig, {"prediction_type": "flow"}, "prediction_type='flow' is not supported"),
        (DDPMSchedulerConfig, {"timestep_spacing": "log"}, "timestep_spacing='log' is not supported"),
        (
            DDPMSchedulerConfig,
            {"variance_type": "learned_range"},
            r"variance_type='learned_range' .* one of \['fixed_small', 'fixed_large'\]",
        ),
        (DDPMSchedulerConfig, {"thresholding": True}, "thresholding=True is not supported"),
        (DDPMSchedulerConfig, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is not supported"),
    ],
)
def test_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind.from_dict(values)
