"""Pairs of our UNet and diffusers' with the same random weights, and inputs for them."""

import dataclasses

import torch
from conftest import randomize_
from diffusers import UNet2DConditionModel as ReferenceUNet

from flux_lab.sd15.config import TINY_UNET
from flux_lab.sd15.unet import UNet2DConditionModel

LIKE_SD15 = dataclasses.replace(
    TINY_UNET,
    block_out_channels=(8, 12, 16, 16),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
)
LOPSIDED = dataclasses.replace(
    TINY_UNET,
    in_channels=5,
    out_channels=3,
    block_out_channels=(12, 6),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=3,
    cross_attention_dim=7,
    attention_head_dim=3,
    norm_num_groups=2,
    norm_eps=1e-3,
)
UNETS = {"tiny": TINY_UNET, "like_sd15": LIKE_SD15, "lopsided": LOPSIDED}


def make_unets(config, dtype=torch.float32):
    """Ours and the reference."""
    reference = randomize_(ReferenceUNet.from_config(config.to_dict())).to(dtype)
    ours = UNet2DConditionModel.from_config(dict(reference.config))
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert ours.config == config
    return ours.to(dtype).eval().requires_grad_(False), reference


def make_inputs(config, size=(8, 12), batch=2, dtype=torch.float32):
    """Keyword arguments that both take."""
    return {
        "sample": torch.randn(batch, config.in_channels, *size).to(dtype),
        "timestep": torch.tensor([981, 3])[:batch],
        "encoder_hidden_states": torch.randn(batch, 9, config.cross_attention_dim).to(dtype),
    }


def make_residuals(ours, inputs):
    """What a ControlNet would give: one residual for every skip, and one for the middle block."""
    temb = ours.embed_time(inputs["timestep"], inputs["sample"])
    skips = ours.run_down(inputs["sample"], temb, inputs["encoder_hidden_states"])
    residuals = [torch.randn(skip.shape).to(skip.dtype) for skip in skips]
    return {"down_block_additional_residuals": residuals, "mid_block_additional_residual": torch.randn_like(skips[-1])}


def assert_same_gradients(ours, reference, call):
    """Gradients of the mean square of all that `call(module)` returns, for every parameter."""
    for module in (ours, reference):
        module.requires_grad_(True)
        sum(output.square().mean() for output in call(module)).backward()
    given, expected = dict(ours.named_parameters()), dict(reference.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in expected.values())
    assert given.keys() == expected.keys()
    for name, parameter in expected.items():
        assert (given[name].grad - parameter.grad).abs().max() <= 1e-4 * largest, name
