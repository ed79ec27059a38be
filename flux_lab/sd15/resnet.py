"""The convolutions of the UNet: a ResNet block that is told the time, and the changes of size between levels.

Unlike the autoencoder's, the ResNet block adds a projection of the time vector between its two convolutions, and the smaller size
comes from a convolution padded on all sides. Source: diffusers `models/resnet.py`, `downsampling.py`, `upsampling.py`.
"""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.sd15.config import UNet2DConditionConfig
from flux_lab.shapes import shaped


class ResnetBlock2D(nn.Module):
    """Norm, SiLU, convolution, plus the time; norm, SiLU, convolution; added to the input, which a 1x1 convolution fits if need be."""

    def __init__(self, config: UNet2DConditionConfig, in_channels: int, out_channels: int):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    @shaped
    def forward(
        self, input_tensor: Float[Tensor, "batch channels height width"], temb: Float[Tensor, "batch time_dim"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        hidden_states = self.conv1(F.silu(self.norm1(input_tensor)))
        # One number a channel, the same at all positions: time can only raise or lower a channel as a whole.
        hidden_states = hidden_states + rearrange(self.time_emb_proj(F.silu(temb)), "batch channels -> batch channels 1 1")
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        residual = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return residual + hidden_states


class Downsample2D(nn.Module):
    """Halve height and width, rounded up, with a strided 3x3 convolution padded on all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    @shaped
    def forward(
        self, hidden_states: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels (height+1)//2 (width+1)//2"]:
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    """Repeat every number until the map has `size` (by default twice its own), then smooth with a 3x3 convolution.

    The UNet asks for the size of the skip that comes next: where the way down met an odd number, twice would be one too many.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    @shaped
    def forward(
        self, hidden_states: Float[Tensor, "batch channels height width"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        height, width = hidden_states.shape[2:]
        return self.conv(F.interpolate(hidden_states, size=size or (2 * height, 2 * width), mode="nearest"))
