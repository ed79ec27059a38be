"""The UNet of Stable Diffusion 1.5: noisy latents, a timestep and a text in, the predicted noise out.

The feature map gets smaller and wider on the way down, larger and narrower on the way up; the skips carry what the small map cannot
hold. Source: Ronneberger et al. 2015, arXiv 1505.04597; Rombach et al. 2022, arXiv 2112.10752; Zhang et al. 2023, arXiv 2302.05543,
for the added residuals; diffusers `models/unets/unet_2d_condition.py`.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from flux_lab.embeddings import TimestepEmbedding, get_timestep_embedding
from flux_lab.sd15 import blocks
from flux_lab.sd15.config import UNet2DConditionConfig
from flux_lab.shapes import ShapeError, shaped


class UNet2DConditionModel(nn.Module):
    """Predict the noise (or v) in `sample`. Stateless: one call a step, two with classifier-free guidance."""

    def __init__(self, config: UNet2DConditionConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_embed_dim)
        self.down_blocks = nn.ModuleList(_down_blocks(config))
        self.mid_block = blocks.UNetMidBlock2DCrossAttn(config, widths[-1])
        self.up_blocks = nn.ModuleList(_up_blocks(config))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, kernel_size=3, padding=1)

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build from the fields of diffusers' `config.json`. Raises ValueError for a field that we cannot honour."""
        return cls(UNet2DConditionConfig.from_dict(values))

    @shaped
    def forward(
        self,
        sample: Float[Tensor, "batch channels height width"],
        timestep: int | float | Real[Tensor, ""] | Real[Tensor, "#batch"],
        encoder_hidden_states: Float[Tensor, "batch length text_dim"],
        down_block_additional_residuals: Sequence[Float[Tensor, "_ _ _ _"]] | None = None,
        mid_block_additional_residual: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """`timestep` in 0 ... 999, one for all or one each; `encoder_hidden_states`: the text encoder's last hidden state.

        The additional residuals, a ControlNet's, are added to the skips, in the order in which `run_down` returns them, and to the
        middle block's output; they come together or not at all. Raises ShapeError and ValueError.
        """
        self._check_inputs(sample, encoder_hidden_states)
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise ValueError("down_block_additional_residuals and mid_block_additional_residual: give both or neither")
        temb = self.embed_time(timestep, sample)
        skips = self.run_down(sample, temb, encoder_hidden_states)
        sample = self.mid_block(skips[-1], temb, encoder_hidden_states)
        if mid_block_additional_residual is not None:
            skips = add_residuals("down_block_additional_residuals", skips, down_block_additional_residuals)
            (sample,) = add_residuals("mid_block_additional_residual", [sample], [mid_block_additional_residual])
        sample = self.run_up(sample, skips, temb, encoder_hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(sample)))

    def embed_time(self, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The time vector, [batch, time_dim]: sinusoids as wide as the first level, then an MLP, in the dtype of `sample`."""
        timesteps = torch.as_tensor(timestep, device=sample.device).float().expand(len(sample))
        return self.time_embedding(get_timestep_embedding(timesteps, self.config.block_out_channels[0]).to(sample.dtype))

    def run_down(self, sample: Tensor, temb: Tensor, encoder_hidden_states: Tensor) -> list[Tensor]:
        """The skips of the way down, largest map first: `conv_in`'s output, then every block's. The last goes to the middle block."""
        skips = [self.conv_in(sample)]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, encoder_hidden_states)
        return skips

    def run_up(self, sample: Tensor, skips: list[Tensor], temb: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The way up, which takes the skips from the end of the list until none is left."""
        for block in self.up_blocks:
            first = len(skips) - len(block.resnets)
            taken, skips = skips[first:], skips[:first]
            size = tuple(skips[-1].shape[2:]) if skips else None
            sample = block(sample, taken, temb, encoder_hidden_states, size)
        return sample

    def _check_inputs(self, sample: Tensor, encoder_hidden_states: Tensor) -> None:
        if sample.shape[1] != self.config.in_channels:
            raise ShapeError(
                f"UNet2DConditionModel.forward: argument `sample`: expected {self.config.in_channels} channels, got {list(sample.shape)}"
            )
        if encoder_hidden_states.shape[2] != self.config.cross_attention_dim:
            raise ShapeError(
                f"UNet2DConditionModel.forward: argument `encoder_hidden_states`: expected vectors of width "
                f"{self.config.cross_attention_dim}, got {list(encoder_hidden_states.shape)}"
            )


def add_residuals(argument: str, states: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Every residual added to its state. Raises ValueError when the numbers differ, ShapeError when two shapes do."""
    if len(residuals) != len(states):
        raise ValueError(f"{argument}: expected {len(states)} residuals, one a skip, got {len(residuals)}")
    for i, (state, residual) in enumerate(zip(states, residuals, strict=True)):
        if state.shape != residual.shape:
            raise ShapeError(f"{argument}: number {i}: expected {list(state.shape)}, got {list(residual.shape)}")
    return [state + residual for state, residual in zip(states, residuals, strict=True)]


def skip_channels(config: UNet2DConditionConfig) -> list[int]:
    """The widths of the skips in the order in which they are made: `conv_in`, then of each level its layers and its downsampler."""
    levels = [[width] * (config.layers_per_block + 1) for width in config.block_out_channels]
    levels[-1].pop()
    return [config.block_out_channels[0], *(width for level in levels for width in level)]


def _down_blocks(config: UNet2DConditionConfig) -> list[nn.Module]:
    outs = config.block_out_channels
    ins = [outs[0], *outs[:-1]]
    last = len(outs) - 1
    return [
        getattr(blocks, name)(config, ins[level], outs[level], add_downsample=level < last)
        for level, name in enumerate(config.down_block_types)
    ]


def _up_blocks(config: UNet2DConditionConfig) -> list[nn.Module]:
    outs = config.block_out_channels[::-1]
    ins = [outs[0], *outs[:-1]]
    last, layers = len(outs) - 1, config.layers_per_block + 1
    newest_first = skip_channels(config)[::-1]
    return [
        getattr(blocks, name)(config, ins[level], outs[level], newest_first[level * layers :][:layers], add_upsample=level < last)
        for level, name in enumerate(config.up_block_types)
    ]
