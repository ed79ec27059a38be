"""Attention as SD 1.5 has it: a feature map's positions look at one another, or at the text.

In cross attention the queries come from the image and the keys and values from the text: the text is read and never changed, where
in FLUX's joint attention (flux_lab/attention.py) both look at both. Source: diffusers `Attention`, `AttnProcessor2_0`.
"""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.shapes import shaped


class Attend(nn.Module):
    """softmax(q k / sqrt(head_dim)) v for every head, with no mask: padding is attended to like every other token."""

    @shaped
    def forward(
        self,
        query: Float[Tensor, "batch tokens heads head_dim"],
        key: Float[Tensor, "batch length heads head_dim"],
        value: Float[Tensor, "batch length heads head_dim"],
    ) -> Float[Tensor, "batch tokens heads head_dim"]:
        query, key, value = (
            rearrange(each, "batch sequence heads head_dim -> batch heads sequence head_dim") for each in (query, key, value)
        )
        return rearrange(F.scaled_dot_product_attention(query, key, value), "batch heads tokens head_dim -> batch tokens heads head_dim")


class Attention(nn.Module):
    """Self-attention, or, with `cross_attention_dim`, attention to a text of vectors of that width.

    Queries, keys and values have no biases, no norms and no positions: what SD 1.5 knows of places comes from its convolutions.
    """

    def __init__(self, query_dim: int, heads: int, cross_attention_dim: int | None = None):
        super().__init__()
        source_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(source_dim, query_dim, bias=False)
        self.to_v = nn.Linear(source_dim, query_dim, bias=False)
        # A list because upstream has a dropout (never used) as its second item: the checkpoint's name is `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim)])
        self.attend = Attend()

    @shaped
    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch length text_dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Without `encoder_hidden_states` the image attends to itself."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attended = self.attend(
            query=self._split_heads(self.to_q(hidden_states)),
            key=self._split_heads(self.to_k(source)),
            value=self._split_heads(self.to_v(source)),
        )
        return self.to_out[0](rearrange(attended, "batch tokens heads head_dim -> batch tokens (heads head_dim)"))

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch sequence (heads head_dim) -> batch sequence heads head_dim", heads=self.heads)
