"""The text encoders, made to be fast: copies that share the reference's weights, with fused projections in their layers."""

import copy
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_lab.clip import CLIPAttention, CLIPTextModel
from flux_lab.inference.fast_linear import FastLinear
from flux_lab.t5 import T5Attention, T5DenseGatedActDense, T5EncoderModel

Model = TypeVar("Model", bound=nn.Module)


def sharing_copy(model: Model) -> Model:
    """A copy whose modules may be replaced, with the very tensors of `model`."""
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, length, 3 * heads * head_dim] to queries, keys and values, each [batch, heads, length, head_dim]."""
    return qkv.unflatten(-1, (3, heads, qkv.shape[-1] // (3 * heads))).permute(2, 0, 3, 1, 4).unbind()


class FastCLIPAttention(nn.Module):
    """One matrix product for queries, keys and values."""

    def __init__(self, attention: CLIPAttention):
        super().__init__()
        self.num_heads, self.out_proj = attention.num_heads, attention.out_proj
        self.qkv = FastLinear(attention.q_proj, attention.k_proj, attention.v_proj)

    def forward(self, hidden_states: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(*heads_of(self.qkv(hidden_states), self.num_heads), is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class FastT5Attention(nn.Module):
    """One matrix product for queries, keys and values; the first layer remembers its bias table for the last length."""

    def __init__(self, attention: T5Attention):
        super().__init__()
        self.num_heads, self.o = attention.config.num_heads, attention.o
        self.qkv = FastLinear(attention.q, attention.k, attention.v)
        self.bias = None
        if hasattr(attention, "relative_attention_bias"):
            # Kept as a reference attention without its projections: it knows how to make the table.
            self.tables = attention
            del self.tables.q, self.tables.k, self.tables.v

    def compute_bias(self, length: int) -> Tensor:
        if self.bias is None or self.bias.shape[-1] != length:
            self.bias = self.tables.compute_bias(length)
        return self.bias

    def forward(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
        queries, keys, values = heads_of(self.qkv(hidden_states), self.num_heads)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=position_bias, scale=1.0)
        return self.o(attended.transpose(1, 2).flatten(2))


class FastT5DenseGatedActDense(nn.Module):
    """GELU in one operation, the product in place. The two projections stay apart: on a CPU one twice as wide takes longer than both."""

    def __init__(self, mlp: T5DenseGatedActDense):
        super().__init__()
        self.wi_0, self.wi_1, self.wo = mlp.wi_0, mlp.wi_1, mlp.wo

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = F.gelu(self.wi_0(hidden_states), approximate="tanh").mul_(self.wi_1(hidden_states))
        return self.wo(gated.to(self.wo.weight.dtype))


FAST = {
    CLIPAttention: FastCLIPAttention,
    T5Attention: FastT5Attention,
    T5DenseGatedActDense: FastT5DenseGatedActDense,
    nn.Linear: FastLinear,  # those that are left
}


@torch.no_grad()
def fast_text_encoder(model: CLIPTextModel | T5EncoderModel) -> CLIPTextModel | T5EncoderModel:
    """The same encoder with fused projections; `model` is left as it is."""
    faster = sharing_copy(model)
    for kind, make_fast in FAST.items():
        for name, module in list(faster.named_modules()):
            if type(module) is kind:
                faster.set_submodule(name, make_fast(module))
    return faster
