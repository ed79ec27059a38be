"""The levels of the UNet. On the way down each layer's output is kept as a skip; on the way up it is put beside the feature map.

A layer is a ResNet block and, in the kinds named CrossAttn, a spatial transformer behind it. SD 1.5's smallest level has none; at
that size only the middle block attends. Source: diffusers `models/unets/unet_2d_blocks.py`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.sd15.config import UNet2DConditionConfig
from flux_lab.sd15.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from flux_lab.sd15.transformer_2d import Transformer2DModel
from flux_lab.shapes import shaped


class DownBlock2D(nn.Module):
    """One level on the way down: `layers_per_block` layers, then half the size, except at the last level."""

    def __init__(self, config: UNet2DConditionConfig, in_channels: int, out_channels: int, add_downsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(config, width, out_channels) for width in widths)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)] if add_downsample else [])

    @shaped
    def forward(
        self,
        hidden_states: Float[Tensor, "batch channels height width"],
        temb: Float[Tensor, "batch time_dim"],
        encoder_hidden_states: Float[Tensor, "batch length text_dim"],
    ) -> list[Float[Tensor, "batch out_channels _ _"]]:
        """The skips: the output of every layer and of the downsampler. The last of them is what the next block goes on with."""
        skips = []
        for i in range(len(self.resnets)):
            hidden_states = self.run_layer(i, hidden_states, temb, encoder_hidden_states)
            skips.append(hidden_states)
        return skips + [downsample(hidden_states) for downsample in self.downsamplers]

    def run_layer(self, i: int, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.resnets[i](hidden_states, temb)


class CrossAttnDownBlock2D(DownBlock2D):
    """The same with a spatial transformer behind every ResNet block."""

    def __init__(self, config: UNet2DConditionConfig, in_channels: int, out_channels: int, add_downsample: bool):
        super().__init__(config, in_channels, out_channels, add_downsample)
        self.attentions = nn.ModuleList(Transformer2DModel(config, out_channels) for _ in self.resnets)

    def run_layer(self, i: int, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.attentions[i](self.resnets[i](hidden_states, temb), encoder_hidden_states)


class UNetMidBlock2DCrossAttn(nn.Module):
    """The smallest feature map: ResNet block, spatial transformer, ResNet block."""

    def __init__(self, config: UNet2DConditionConfig, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2DModel(config, channels)])

    @shaped
    def forward(
        self,
        hidden_states: Float[Tensor, "batch channels height width"],
        temb: Float[Tensor, "batch time_dim"],
        encoder_hidden_states: Float[Tensor, "batch length text_dim"],
    ) -> Float[Tensor, "batch channels height width"]:
        hidden_states = self.resnets[0](hidden_states, temb)
        hidden_states = self.attentions[0](hidden_states, encoder_hidden_states)
        return self.resnets[1](hidden_states, temb)


class UpBlock2D(nn.Module):
    """One level on the way up: a layer more than on the way down, each fed a skip, then the next skip's size, except at the last level.

    `skip_channels` are the widths of the skips in the order in which the layers take them: the newest first.
    """

    def __init__(
        self, config: UNet2DConditionConfig, in_channels: int, out_channels: int, skip_channels: Sequence[int], add_upsample: bool
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(config, width + skip, out_channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if add_upsample else [])

    @shaped
    def forward(
        self,
        hidden_states: Float[Tensor, "batch channels height width"],
        res_hidden_states_tuple: Sequence[Float[Tensor, "batch _ height width"]],
        temb: Float[Tensor, "batch time_dim"],
        encoder_hidden_states: Float[Tensor, "batch length text_dim"],
        upsample_size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:
        """`res_hidden_states_tuple`: as many skips as there are layers, oldest first. `upsample_size`: what to grow to."""
        for i, skip in enumerate(reversed(res_hidden_states_tuple)):
            hidden_states = self.run_layer(i, torch.cat([hidden_states, skip], dim=1), temb, encoder_hidden_states)
        for upsample in self.upsamplers:
            hidden_states = upsample(hidden_states, upsample_size)
        return hidden_states

    def run_layer(self, i: int, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.resnets[i](hidden_states, temb)


class CrossAttnUpBlock2D(UpBlock2D):
    """The same with a spatial transformer behind every ResNet block."""

    def __init__(
        self, config: UNet2DConditionConfig, in_channels: int, out_channels: int, skip_channels: Sequence[int], add_upsample: bool
    ):
        super().__init__(config, in_channels, out_channels, skip_channels, add_upsample)
        self.attentions = nn.ModuleList(Transformer2DModel(config, out_channels) for _ in self.resnets)

    def run_layer(self, i: int, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.attentions[i](self.resnets[i](hidden_states, temb), encoder_hidden_states)
