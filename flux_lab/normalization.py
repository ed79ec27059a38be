"""Adaptive layer norms: normalise, then let the conditioning vector set shift, scale and gate of every channel.

shift and scale act on the *input* of attention and MLP, the gate on their output. "Zero" says how training starts: with the
linear at zero every gate is zero and every block is the identity. Source: DiT (Peebles & Xie 2023, arXiv 2212.09748, section 3.2),
diffusers `models/normalization.py`.
"""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.shapes import shaped

EPS = 1e-6


class Modulation(NamedTuple):
    """What the conditioning vector says to one sub-layer."""

    shift: Float[Tensor, "batch dim"]
    scale: Float[Tensor, "batch dim"]
    gate: Float[Tensor, "batch dim"]


def modulate(x: Float[Tensor, "batch sequence dim"], shift: Float[Tensor, "batch dim"], scale: Float[Tensor, "batch dim"]) -> Tensor:
    """x (1 + scale) + shift, the same for every token of a sequence."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(dim: int) -> nn.LayerNorm:
    """The layer norm in front of every modulation: without weight and bias of its own."""
    return nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)


class AdaLayerNormZero(nn.Module):
    """Double-stream block: six signals, (shift, scale, gate) for attention, then (shift, scale, gate) for the MLP."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 6 * embedding_dim)
        self.norm = layer_norm(embedding_dim)

    @shaped
    def forward(
        self, x: Float[Tensor, "batch sequence dim"], temb: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch sequence dim"], Float[Tensor, "batch dim"], Modulation]:
        """Returns the modulated input of attention, the gate of its output, and the modulation of the MLP."""
        signals = self.linear(F.silu(temb)).chunk(6, dim=1)
        attention, mlp = Modulation(*signals[:3]), Modulation(*signals[3:])
        return modulate(self.norm(x), attention.shift, attention.scale), attention.gate, mlp


class AdaLayerNormZeroSingle(nn.Module):
    """Single-stream block: three signals, because attention and MLP run side by side on one input."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 3 * embedding_dim)
        self.norm = layer_norm(embedding_dim)

    @shaped
    def forward(
        self, x: Float[Tensor, "batch sequence dim"], temb: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch sequence dim"], Float[Tensor, "batch dim"]]:
        """Returns the modulated input and the gate of the output."""
        shift, scale, gate = self.linear(F.silu(temb)).chunk(3, dim=1)
        return modulate(self.norm(x), shift, scale), gate


class AdaLayerNormContinuous(nn.Module):
    """Last layer: two signals, in the order **scale, shift**, the other way round than in the blocks."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 2 * embedding_dim)
        self.norm = layer_norm(embedding_dim)

    @shaped
    def forward(
        self, x: Float[Tensor, "batch sequence dim"], conditioning_embedding: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch sequence dim"]:
        scale, shift = self.linear(F.silu(conditioning_embedding)).chunk(2, dim=1)
        return modulate(self.norm(x), shift, scale)
