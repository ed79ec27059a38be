"""The two kinds of transformer block. 19 double-stream blocks keep text and image apart, with weights of their own, and join them in
attention; 38 single-stream blocks then treat both as one sequence. Source: diffusers `transformer_flux.py`."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.attention import FluxAttention
from flux_lab.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, layer_norm, modulate
from flux_lab.shapes import shaped

MLP_RATIO = 4
FLOAT16_MAX = 65504


class GELU(nn.Module):
    """Linear, then GELU in its tanh approximation."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)

    def forward(self, x: Float[Tensor, "batch sequence dim"]) -> Float[Tensor, "batch sequence hidden"]:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The MLP of a double-stream block: dim -> 4 dim -> dim."""

    def __init__(self, dim: int):
        super().__init__()
        # Upstream's list has a dropout (never used) in the middle: the checkpoint's names are `net.0.proj` and `net.2`.
        self.net = nn.Sequential(GELU(dim, MLP_RATIO * dim), nn.Identity(), nn.Linear(MLP_RATIO * dim, dim))

    @shaped
    def forward(self, hidden_states: Float[Tensor, "batch sequence dim"]) -> Float[Tensor, "batch sequence dim"]:
        return self.net(hidden_states)


class FluxTransformerBlock(nn.Module):
    """Double-stream block: two residual streams, joined only inside attention."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.norm1_context = AdaLayerNormZero(dim)
        self.attn = FluxAttention(dim, heads=num_attention_heads, dim_head=attention_head_dim, added_kv_proj_dim=dim)
        self.norm2 = layer_norm(dim)
        self.ff = FeedForward(dim)
        self.norm2_context = layer_norm(dim)
        self.ff_context = FeedForward(dim)

    @shaped
    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch length dim"],
        temb: Float[Tensor, "batch dim"],
        image_rotary_emb: tuple[Float[Tensor, "sequence head_dim"], Float[Tensor, "sequence head_dim"]],
    ) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch tokens dim"]]:
        """Returns (text stream, image stream)."""
        image, image_gate, image_mlp = self.norm1(hidden_states, temb)
        text, text_gate, text_mlp = self.norm1_context(encoder_hidden_states, temb)
        image, text = self.attn(hidden_states=image, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb)

        hidden_states = hidden_states + image_gate[:, None] * image
        image = self.ff(modulate(self.norm2(hidden_states), image_mlp.shift, image_mlp.scale))
        hidden_states = hidden_states + image_mlp.gate[:, None] * image

        encoder_hidden_states = encoder_hidden_states + text_gate[:, None] * text
        text = self.ff_context(modulate(self.norm2_context(encoder_hidden_states), text_mlp.shift, text_mlp.scale))
        encoder_hidden_states = encoder_hidden_states + text_mlp.gate[:, None] * text
        # Upstream keeps float16 from overflowing in the text stream alone.
        return _clip_float16(encoder_hidden_states), hidden_states


class FluxSingleTransformerBlock(nn.Module):
    """Single-stream block: attention and MLP side by side on one normalised sequence, one projection for both outputs."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int):
        super().__init__()
        self.norm = AdaLayerNormZeroSingle(dim)
        self.attn = FluxAttention(dim, heads=num_attention_heads, dim_head=attention_head_dim, pre_only=True)
        self.proj_mlp = nn.Linear(dim, MLP_RATIO * dim)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(dim + MLP_RATIO * dim, dim)

    @shaped
    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch length dim"],
        temb: Float[Tensor, "batch dim"],
        image_rotary_emb: tuple[Float[Tensor, "sequence head_dim"], Float[Tensor, "sequence head_dim"]],
    ) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch tokens dim"]]:
        """Returns (text tokens, image tokens)."""
        length = encoder_hidden_states.shape[1]
        sequence = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(sequence, temb)
        mlp = self.act_mlp(self.proj_mlp(normed))
        attention = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        sequence = sequence + gate[:, None] * self.proj_out(torch.cat([attention, mlp], dim=2))
        sequence = _clip_float16(sequence)
        return sequence[:, :length], sequence[:, length:]


def _clip_float16(x: Tensor) -> Tensor:
    return x.clip(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x
