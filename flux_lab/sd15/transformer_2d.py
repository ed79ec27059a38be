"""The spatial transformer: a feature map as a sequence of positions, which attend to one another and then to the text.

Source: Rombach et al. 2022, arXiv 2112.10752, section 3.3 and appendix E.2.1; diffusers `models/transformers/transformer_2d.py`,
`models/attention.py`.
"""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.sd15.attention import Attention
from flux_lab.sd15.config import UNet2DConditionConfig
from flux_lab.shapes import shaped

MLP_RATIO = 4
# Not the config's `norm_eps`: upstream fixes this one.
NORM_EPS = 1e-6


class GEGLU(nn.Module):
    """One linear layer makes values and gates, in this order; the values are multiplied by GELU of the gates (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens hidden"]:
        values, gates = self.proj(hidden_states).chunk(2, dim=-1)
        return values * F.gelu(gates)


class FeedForward(nn.Module):
    """The MLP: dim -> 4 dim, gated -> dim."""

    def __init__(self, dim: int):
        super().__init__()
        # Upstream's list has a dropout (never used) in the middle: the checkpoint's names are `net.0.proj` and `net.2`.
        self.net = nn.Sequential(GEGLU(dim, MLP_RATIO * dim), nn.Identity(), nn.Linear(MLP_RATIO * dim, dim))

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.net(hidden_states)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross attention to the text, MLP; each normalised before and added to the stream. Time has no say here."""

    def __init__(self, dim: int, heads: int, cross_attention_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, cross_attention_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    @shaped
    def forward(
        self, hidden_states: Float[Tensor, "batch tokens dim"], encoder_hidden_states: Float[Tensor, "batch length text_dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        hidden_states = self.attn1(self.norm1(hidden_states)) + hidden_states
        hidden_states = self.attn2(self.norm2(hidden_states), encoder_hidden_states) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


class Transformer2DModel(nn.Module):
    """Feature map to sequence, one transformer block, and back, added to the input."""

    def __init__(self, config: UNet2DConditionConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=NORM_EPS)
        self.proj_in = nn.Conv2d(channels, channels, kernel_size=1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, config.heads, config.cross_attention_dim)])
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    @shaped
    def forward(
        self, hidden_states: Float[Tensor, "batch channels height width"], encoder_hidden_states: Float[Tensor, "batch length text_dim"]
    ) -> Float[Tensor, "batch channels height width"]:
        height, width = hidden_states.shape[2:]
        positions = rearrange(self.proj_in(self.norm(hidden_states)), "batch channels height width -> batch (height width) channels")
        for block in self.transformer_blocks:
            positions = block(positions, encoder_hidden_states)
        feature_map = rearrange(positions, "batch (height width) channels -> batch channels height width", height=height, width=width)
        # Contiguous as upstream: in half precision a convolution rounds differently on a strided input.
        return self.proj_out(feature_map.contiguous()) + hidden_states
