"""The autoencoder's decoder, made to be fast: channels last in memory, less kept at a time, fewer products in the upsampling."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_lab.autoencoder import AutoencoderKL, ResnetBlock2D, Upsample2D

PARTS = 4  # in which a norm is taken in place


def normalize_(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The group norm of x in place, some of its groups at a time: without a second feature map of its size."""
    parts = math.gcd(PARTS, norm.num_groups)
    for some, weight, bias in zip(x.chunk(parts, dim=1), norm.weight.chunk(parts), norm.bias.chunk(parts), strict=True):
        some.copy_(F.group_norm(some, norm.num_groups // parts, weight, bias, norm.eps))
    return x


class FastResnetBlock2D(nn.Module):
    """The block with its activations in place, and its sum in the memory of its input, which nobody needs again.

    Whoever called still holds that memory. Where the number of channels falls, a part of it is enough for what the shortcut gave, and
    before that it serves the norm.
    """

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Bound to one name, so that each map is freed as soon as the next is there.
        rest = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        falls = rest.shape[1] < hidden_states.shape[1]
        x = normalize_(self.norm1, hidden_states) if falls else self.norm1(hidden_states)
        x = self.conv1(F.silu(x, inplace=True))
        if falls:
            rest = hidden_states[:, : rest.shape[1]].copy_(rest)
        x = F.silu(self.norm2(x), inplace=True)
        x = self.conv2(x)
        return rest.add_(x)


class FastUpsample2D(nn.Module):
    """Doubling and smoothing in one: a transposed convolution.

    Repeating every number and then convolving with 3x3 weights multiplies most numbers twice. The sum of the weights that meet the same
    number is a 4x4 kernel, moved by two: 16 products for each number of the input where there were 36.
    """

    def __init__(self, upsample: Upsample2D):
        super().__init__()
        weight, self.bias = upsample.conv.weight, upsample.conv.bias
        box = weight.new_ones(1, 1, 2, 2)
        out_channels, in_channels = weight.shape[:2]
        # A transposed convolution reads its kernel from the other end.
        spread = F.conv2d(weight.float().flatten(0, 1)[:, None], box.float(), padding=1).to(weight.dtype)
        kernel = spread.unflatten(0, (out_channels, in_channels))[:, :, 0].flip(2, 3).transpose(0, 1)
        self.weight = nn.Parameter(kernel.contiguous(), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.conv_transpose2d(hidden_states, self.weight, self.bias, stride=2, padding=1)


FAST = {ResnetBlock2D: FastResnetBlock2D, Upsample2D: FastUpsample2D}


@torch.no_grad()
def fast_autoencoder(model: AutoencoderKL, tiling: bool = False) -> AutoencoderKL:
    """A copy that decodes faster. With `tiling`, pictures larger than `sample_size` go tile by tile, which changes them a little."""
    faster = copy.deepcopy(model)
    for name, module in list(faster.decoder.named_modules()):
        if type(module) in FAST:
            faster.decoder.set_submodule(name, FAST[type(module)](module))
    faster.enable_tiling(tiling)
    return faster.to(memory_format=torch.channels_last)
