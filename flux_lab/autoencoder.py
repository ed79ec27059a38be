"""The variational autoencoder: images to latents and back, eight times smaller along each side.

Encoder: convolutions that halve the size three times, one attention in the middle, and a Gaussian for every latent number.
Decoder: the mirror image. Source: diffusers `models/autoencoders/autoencoder_kl.py` and `vae.py`; Rombach et al. 2022, section 3.1.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.config import AutoencoderKLConfig
from flux_lab.latents import prepare_noise
from flux_lab.shapes import ShapeError, shaped

NORM_EPS = 1e-6
TILE_OVERLAP = 0.25


class ResnetBlock2D(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input. A 1x1 convolution fits the input where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out_channels height width"]:
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return residual + hidden_states


class Downsample2D(nn.Module):
    """Halve height and width with a strided 3x3 convolution. Zeros are added on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height//2 width//2"]:
        left, right, top, bottom = 0, 1, 0, 1
        return self.conv(F.pad(hidden_states, (left, right, top, bottom)))


class Upsample2D(nn.Module):
    """Double height and width by repeating every number, then smooth with a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels 2*height 2*width"]:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Self-attention over all positions, with one head as wide as the feature map, added to the input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        rows, columns = hidden_states.shape[2:]
        # Flattened before the norm, not after: the two round differently in 16 bit.
        positions = rearrange(hidden_states, "batch channels rows columns -> batch channels (rows columns)")
        normed = rearrange(self.group_norm(positions), "batch channels positions -> batch positions channels")
        query, key, value = (
            rearrange(project(normed), "batch positions channels -> batch 1 positions channels")
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = rearrange(F.scaled_dot_product_attention(query, key, value), "batch 1 positions channels -> batch positions channels")
        attended = rearrange(
            self.to_out[0](attended), "batch (rows columns) channels -> batch channels rows columns", rows=rows, columns=columns
        )
        # In this order: a sum is laid out in memory like its first term, and the layout decides how the next convolution rounds in 16 bit.
        return attended + hidden_states


class DownEncoderBlock2D(nn.Module):
    """One level of the encoder: ResNet blocks, then half the size, except at the last level."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int, downsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(ResnetBlock2D(widths[i], out_channels, groups) for i in range(num_layers))
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)] if downsample else [])

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out_channels rows columns"]:
        for layer in [*self.resnets, *self.downsamplers]:
            hidden_states = layer(hidden_states)
        return hidden_states


class UpDecoderBlock2D(nn.Module):
    """One level of the decoder: ResNet blocks, then twice the size, except at the last level."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int, upsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(ResnetBlock2D(widths[i], out_channels, groups) for i in range(num_layers))
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out_channels rows columns"]:
        for layer in [*self.resnets, *self.upsamplers]:
            hidden_states = layer(hidden_states)
        return hidden_states


class UNetMidBlock2D(nn.Module):
    """The smallest feature map: ResNet block, attention, ResNet block. The only attention of the autoencoder."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        hidden_states = self.resnets[0](hidden_states)
        hidden_states = self.attentions[0](hidden_states)
        return self.resnets[1](hidden_states)


class Encoder(nn.Module):
    """Image to moments: for every latent number a mean and the logarithm of a variance."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        outs, groups = config.block_out_channels, config.norm_num_groups
        ins = [outs[0], *outs[:-1]]
        last = len(outs) - 1
        self.conv_in = nn.Conv2d(config.in_channels, outs[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(ins[level], outs[level], config.layers_per_block, groups, downsample=level < last)
            for level in range(len(outs))
        )
        self.mid_block = UNetMidBlock2D(outs[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, outs[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(outs[-1], 2 * config.latent_channels, kernel_size=3, padding=1)

    @shaped
    def forward(self, sample: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch moments rows columns"]:
        sample = self.conv_in(sample)
        for block in self.down_blocks:
            sample = block(sample)
        sample = self.mid_block(sample)
        return self.conv_out(F.silu(self.conv_norm_out(sample)))


class Decoder(nn.Module):
    """Latents to image. One ResNet block a level more than the encoder has."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        outs, groups = config.block_out_channels[::-1], config.norm_num_groups
        ins = [outs[0], *outs[:-1]]
        last = len(outs) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, outs[0], kernel_size=3, padding=1)
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(ins[level], outs[level], config.layers_per_block + 1, groups, upsample=level < last)
            for level in range(len(outs))
        )
        self.mid_block = UNetMidBlock2D(outs[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, outs[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(outs[-1], config.out_channels, kernel_size=3, padding=1)

    @shaped
    def forward(self, sample: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch out_channels height width"]:
        sample = self.mid_block(self.conv_in(sample))
        for block in self.up_blocks:
            sample = block(sample)
        return self.conv_out(F.silu(self.conv_norm_out(sample)))


class DiagonalGaussianDistribution:
    """The posterior: an independent Gaussian for every latent number. Fields `mean`, `logvar`, `std`, `var`.

    The logarithm of the variance is clamped to [-30, 20], so that neither `exp` nor the KL divergence overflows.
    """

    @shaped
    def __init__(self, parameters: Float[Tensor, "batch moments height width"]):
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    @shaped
    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Float[Tensor, "batch channels height width"]:
        """Draw latents: mean + std * noise, which lets gradients pass (Kingma & Welling 2014, section 2.4)."""
        return self.mean + self.std * prepare_noise(tuple(self.mean.shape), generator, self.mean.dtype, self.mean.device)

    @shaped
    def mode(self) -> Float[Tensor, "batch channels height width"]:
        """The most likely latents: the mean."""
        return self.mean

    @shaped
    def kl(self) -> Float[Tensor, "batch"]:
        """KL divergence from the standard normal distribution, in nats, summed over one image."""
        return 0.5 * torch.sum(self.mean**2 + self.var - 1.0 - self.logvar, dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """Encode images in [-1, 1] to a distribution over latents, decode latents to images.

    `encode` and `decode` leave out the scaling: the pipeline's latents are `(z - shift_factor) * scaling_factor`.
    `enable_slicing()` runs one image at a time; `enable_tiling()` cuts an image that is larger than `sample_size` into overlapping
    tiles and blends them. Both save memory; tiling changes the result a little, because a tile does not see its surroundings.
    """

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, kernel_size=1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, kernel_size=1) if config.use_post_quant_conv else None
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = config.sample_size
        self.tile_latent_min_size = config.sample_size // config.vae_scale_factor

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build from the fields of diffusers' `config.json`. Raises ValueError for a field that we cannot honour."""
        return cls(AutoencoderKLConfig.from_dict(values))

    def enable_slicing(self, enabled: bool = True) -> None:
        """Encode and decode the images of a batch one by one."""
        self.use_slicing = enabled

    def enable_tiling(self, enabled: bool = True) -> None:
        """Encode and decode large images tile by tile."""
        self.use_tiling = enabled

    @shaped
    def forward(
        self,
        sample: Float[Tensor, "batch channels height width"],
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Encode, take the mode (or a sample), decode."""
        posterior = self.encode(sample)
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode())

    @shaped
    def encode(self, images: Float[Tensor, "batch channels height width"]) -> DiagonalGaussianDistribution:
        """Images in [-1, 1] to the distribution of their latents, `vae_scale_factor` times smaller.

        Raises ShapeError when the number of channels is not `config.in_channels` or the image is smaller than one latent.
        """
        _check_size("AutoencoderKL.encode", "images", images, channels=self.config.in_channels, smallest=self.config.vae_scale_factor)
        return DiagonalGaussianDistribution(self._by_slices(self._encode, images))

    @shaped
    def decode(self, latents: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch out_channels height width"]:
        """Latents, already divided by the scaling factor and shifted, to images in about [-1, 1].

        Raises ShapeError when the number of channels is not `config.latent_channels`.
        """
        _check_size("AutoencoderKL.decode", "latents", latents, channels=self.config.latent_channels, smallest=1)
        return self._by_slices(self._decode, latents)

    def _by_slices(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if not self.use_slicing:
            return function(batch)
        return torch.cat([function(image) for image in batch.split(1)])

    def _encode(self, images: Tensor) -> Tensor:
        if self.use_tiling and max(images.shape[2:]) > self.tile_sample_min_size:
            return run_tiled(self._encode_tile, images, tile_in=self.tile_sample_min_size, tile_out=self.tile_latent_min_size)
        return self._encode_tile(images)

    def _decode(self, latents: Tensor) -> Tensor:
        if self.use_tiling and max(latents.shape[2:]) > self.tile_latent_min_size:
            return run_tiled(self._decode_tile, latents, tile_in=self.tile_latent_min_size, tile_out=self.tile_sample_min_size)
        return self._decode_tile(latents)

    def _encode_tile(self, images: Tensor) -> Tensor:
        moments = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode_tile(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


@shaped
def run_tiled(
    function: Callable[[Tensor], Tensor], batch: Float[Tensor, "batch channels height width"], tile_in: int, tile_out: int
) -> Float[Tensor, "batch out_channels out_height out_width"]:
    """Apply `function` to square tiles of side `tile_in` that overlap by a quarter, and blend its outputs, of side `tile_out`.

    Every output tile fades in over its upper and left neighbour, and gives up its own lower and right quarter to the next.
    """
    stride = int(tile_in * (1 - TILE_OVERLAP))
    overlap = int(tile_out * TILE_OVERLAP)
    keep = tile_out - overlap
    height, width = batch.shape[2:]
    tiles = [
        [function(batch[:, :, top : top + tile_in, left : left + tile_in]) for left in range(0, width, stride)]
        for top in range(0, height, stride)
    ]
    rows = []
    for i, row in enumerate(tiles):
        for j in range(len(row)):
            if i > 0:
                row[j] = blend(tiles[i - 1][j], row[j], overlap, axis=2)
            if j > 0:
                row[j] = blend(row[j - 1], row[j], overlap, axis=3)
        rows.append(torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3))
    return torch.cat(rows, dim=2)


def blend(before: Tensor, after: Tensor, overlap: int, axis: int) -> Tensor:
    """`after`, its first `overlap` lines faded in over the last lines of `before`."""
    overlap = min(before.shape[axis], after.shape[axis], overlap)
    ending = before.narrow(axis, before.shape[axis] - overlap, overlap).unbind(axis)
    beginning = after.narrow(axis, 0, overlap).unbind(axis)
    # Line by line with a Python number as weight, because a weight tensor in bf16 would be rounded.
    faded = [old * (1 - i / overlap) + new * (i / overlap) for i, (old, new) in enumerate(zip(ending, beginning, strict=True))]
    rest = after.narrow(axis, overlap, after.shape[axis] - overlap)
    return torch.cat([torch.stack(faded, axis), rest], axis) if faded else after


def _check_size(function: str, argument: str, given: Tensor, channels: int, smallest: int) -> None:
    if given.shape[1] != channels or min(given.shape[2:]) < smallest:
        got = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
        raise ShapeError(f"{function}: argument `{argument}`: expected {channels} channels of at least {smallest}x{smallest}, got {got}")
