"""Joint attention: text and image tokens in one sequence, each attending to all.

The rotation and the attention product are modules of their own without parameters, so that a forward hook can see queries and
keys before and after them. Source: diffusers `FluxAttention`, `FluxAttnProcessor`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.normalization import EPS
from flux_lab.rope import apply_rotary_emb
from flux_lab.shapes import shaped

Rotation = tuple[Float[Tensor, "sequence head_dim"], Float[Tensor, "sequence head_dim"]]


class Rope(nn.Module):
    """Turn queries and keys by their positions (rope.py)."""

    def forward(self, query: Tensor, key: Tensor, image_rotary_emb: Rotation) -> tuple[Tensor, Tensor]:
        return apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)


class Attend(nn.Module):
    """softmax(q k / sqrt(head_dim)) v for every head, with no mask: padding is attended to like every other token."""

    @shaped
    def forward(
        self,
        query: Float[Tensor, "batch sequence heads head_dim"],
        key: Float[Tensor, "batch sequence heads head_dim"],
        value: Float[Tensor, "batch sequence heads head_dim"],
    ) -> Float[Tensor, "batch sequence heads head_dim"]:
        query, key, value = (
            rearrange(each, "batch sequence heads head_dim -> batch heads sequence head_dim") for each in (query, key, value)
        )
        return rearrange(
            F.scaled_dot_product_attention(query, key, value), "batch heads sequence head_dim -> batch sequence heads head_dim"
        )


class FluxAttention(nn.Module):
    """Attention of both kinds of block.

    With `added_kv_proj_dim` (double-stream) the text has projections of its own, `add_*_proj`, and is put in front of the image;
    with `pre_only` (single-stream) the one sequence holds both already, and the output projection is the block's.
    """

    def __init__(self, query_dim: int, heads: int, dim_head: int, added_kv_proj_dim: int | None = None, pre_only: bool = False):
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.norm_q = nn.RMSNorm(dim_head, eps=EPS)
        self.norm_k = nn.RMSNorm(dim_head, eps=EPS)
        self.to_q = nn.Linear(query_dim, inner_dim)
        self.to_k = nn.Linear(query_dim, inner_dim)
        self.to_v = nn.Linear(query_dim, inner_dim)
        if not pre_only:
            # A list because upstream has a dropout (never used) as its second item: the checkpoint's name is `to_out.0`.
            self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim)])
        if added_kv_proj_dim is not None:
            self.norm_added_q = nn.RMSNorm(dim_head, eps=EPS)
            self.norm_added_k = nn.RMSNorm(dim_head, eps=EPS)
            self.add_q_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            self.add_k_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            self.add_v_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            self.to_add_out = nn.Linear(inner_dim, query_dim)
        self.rope = Rope()
        self.attend = Attend()

    @shaped
    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch length dim"] | None = None,
        image_rotary_emb: tuple[Float[Tensor, "sequence head_dim"], Float[Tensor, "sequence head_dim"]] | None = None,
    ) -> Float[Tensor, "batch tokens dim"] | tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch length dim"]]:
        """Returns the image's output and, when the text comes as a stream of its own, the text's."""
        query = self.norm_q(self._split_heads(self.to_q(hidden_states)))
        key = self.norm_k(self._split_heads(self.to_k(hidden_states)))
        value = self._split_heads(self.to_v(hidden_states))
        if encoder_hidden_states is not None:
            # Text first, in every concatenation of FLUX.
            query = torch.cat([self.norm_added_q(self._split_heads(self.add_q_proj(encoder_hidden_states))), query], dim=1)
            key = torch.cat([self.norm_added_k(self._split_heads(self.add_k_proj(encoder_hidden_states))), key], dim=1)
            value = torch.cat([self._split_heads(self.add_v_proj(encoder_hidden_states)), value], dim=1)
        if image_rotary_emb is not None:
            query, key = self.rope(query, key, image_rotary_emb)
        output = rearrange(self.attend(query, key, value), "batch sequence heads head_dim -> batch sequence (heads head_dim)")
        if encoder_hidden_states is None:
            return output
        length = encoder_hidden_states.shape[1]
        # Contiguous as upstream: in half precision a matrix product rounds differently on a strided input.
        return self.to_out[0](output[:, length:].contiguous()), self.to_add_out(output[:, :length].contiguous())

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch sequence (heads head_dim) -> batch sequence heads head_dim", heads=self.heads)
