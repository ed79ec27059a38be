"""The conditioning vector: time, guidance strength and CLIP's pooled vector, each through a small MLP, added up.

It tells every AdaLayerNorm of the model what to do (normalization.py). Source: diffusers `models/embeddings.py`.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.shapes import shaped

SINUSOIDS = 256


@shaped
def get_timestep_embedding(
    timesteps: Float[Tensor, "batch"], embedding_dim: int = SINUSOIDS, max_period: float = 10000.0
) -> Float[Tensor, "batch embedding_dim"]:
    """Sinusoids of a number in 0 ... 1000, cosines first: cos(t w_i), sin(t w_i) with w_i = max_period^(-i / (dim/2)). Always float32."""
    half = embedding_dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponent)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, linear: sinusoids to the model's width."""

    def __init__(self, in_channels: int, time_embed_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    @shaped
    def forward(self, sample: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch dim"]:
        return self.linear_2(F.silu(self.linear_1(sample)))


class PixArtAlphaTextProjection(TimestepEmbedding):
    """The same MLP for CLIP's pooled vector, under the name that diffusers took from PixArt-alpha."""


class CombinedTimestepTextProjEmbeddings(nn.Module):
    """Time and pooled text: FLUX.1-schnell."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(SINUSOIDS, embedding_dim)
        self.text_embedder = PixArtAlphaTextProjection(pooled_projection_dim, embedding_dim)

    @shaped
    def forward(self, timestep: Float[Tensor, "batch"], pooled_projection: Float[Tensor, "batch pooled_dim"]) -> Float[Tensor, "batch dim"]:
        """`timestep` in 0 ... 1000."""
        time = self.timestep_embedder(get_timestep_embedding(timestep).to(pooled_projection.dtype))
        return time + self.text_embedder(pooled_projection)


class CombinedTimestepGuidanceTextProjEmbeddings(CombinedTimestepTextProjEmbeddings):
    """Time, guidance and pooled text, added in this order: FLUX.1-dev."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int):
        super().__init__(embedding_dim, pooled_projection_dim)
        self.guidance_embedder = TimestepEmbedding(SINUSOIDS, embedding_dim)

    @shaped
    def forward(
        self, timestep: Float[Tensor, "batch"], guidance: Float[Tensor, "batch"], pooled_projection: Float[Tensor, "batch pooled_dim"]
    ) -> Float[Tensor, "batch dim"]:
        """`timestep` in 0 ... 1000, `guidance` likewise times 1000: 3.5 comes as 3500."""
        dtype = pooled_projection.dtype
        time = self.timestep_embedder(get_timestep_embedding(timestep).to(dtype))
        strength = self.guidance_embedder(get_timestep_embedding(guidance).to(dtype))
        return (time + strength) + self.text_embedder(pooled_projection)
