"""CLIP's text encoder: token ids in, one vector for every token and one pooled vector out.

FLUX.1 uses the pooled vector only. Twelve pre-norm transformer layers with a causal mask, so the end token, which comes last, is the
one that has seen the whole prompt: its vector is the pooled one. Names follow transformers `models/clip/modeling_clip.py`.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from flux_lab.config import CLIPTextConfig
from flux_lab.shapes import shaped

# The end token's id in the first published configurations. It was wrong, and is now the sign for "pool the highest id of the sequence".
_HISTORICAL_EOS_TOKEN_ID = 2


class CLIPTextOutput(NamedTuple):
    """What the text encoder returns, after the final norm: `last_hidden_state` [batch, length, dim] and `pooler_output` [batch, dim]."""

    last_hidden_state: Tensor
    pooler_output: Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that CLIP was trained with (Hendrycks and Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


class CLIPAttend(nn.Module):
    """The causal attention product: softmax(Q K^T / sqrt(head_dim)) V, where a token sees itself and what precedes it.

    Has no parameters. It is a module so that a forward hook sees queries, keys and values; from there `probabilities` gives the weights.
    """

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries, keys, values and result: [batch, heads, length, head_dim]."""
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """How much each token (row) takes from each token (column): [batch, heads, length, length] in fp32, rows sum to 1."""
        scores = queries.float() @ keys.float().mT * queries.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1)


class CLIPAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.attend = CLIPAttend()

    def forward(self, hidden_states: Tensor) -> Tensor:
        queries, keys, values = (
            rearrange(projection(hidden_states), "batch length (heads head_dim) -> batch heads length head_dim", heads=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = self.attend(queries, keys, values)
        return self.out_proj(rearrange(attended, "batch heads length head_dim -> batch length (heads head_dim)"))


class CLIPMLP(nn.Module):
    """Two linears with quick_gelu between them, 4x as wide inside."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(hidden_states)))


class CLIPEncoderLayer(nn.Module):
    """Attention, then MLP, each on the normed residual stream and added back to it."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class CLIPTextEmbeddings(nn.Module):
    """A learned vector for the token plus a learned vector for its place."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        length, places = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > places:
            raise ValueError(f"input_ids: {length} tokens, but this CLIP has position embeddings for max_position_embeddings={places}")
        return self.token_embedding(input_ids) + self.position_embedding(torch.arange(length, device=input_ids.device))


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class CLIPTextModel(nn.Module):
    """CLIP's text encoder without its projection into the joint text-image space, which FLUX.1 does not use."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.reset_parameters()

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build from an upstream `config.json`, already parsed. Raises ValueError for a setting that we do not support."""
        return cls(CLIPTextConfig.from_dict(values))

    def reset_parameters(self) -> None:
        """Initialise as CLIP does (Radford et al. 2021, section 2.5): layers that write to the residual stream start smaller with depth."""
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        nn.init.normal_(self.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)
        for layer in self.encoder.layers:
            attention = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.fc2):
                nn.init.normal_(linear.weight, std=(2 * width * depth) ** -0.5)
            nn.init.normal_(attention.out_proj.weight, std=width**-0.5)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)

    @shaped
    def forward(self, input_ids: Int[Tensor, "batch length"]) -> CLIPTextOutput:
        """Encode token ids, normally 77 a prompt: start token, text, end token, padding.

        Padding needs no mask: it comes after the end token. Raises ValueError when there are more tokens than position embeddings.
        Source: transformers `CLIPTextModel.forward`.
        """
        last_hidden_state = self.final_layer_norm(self.encoder(self.embeddings(input_ids)))
        batch = torch.arange(len(input_ids), device=input_ids.device)
        return CLIPTextOutput(last_hidden_state, last_hidden_state[batch, self.pooled_positions(input_ids)])

    def pooled_positions(self, input_ids: Tensor) -> Tensor:
        """The place of the end token in each sequence, [batch].

        With the historical `eos_token_id` of 2, as FLUX.1 has it, the first of the highest ids: so the end token must have the highest
        id of the vocabulary. Otherwise the first `eos_token_id`, and place 0 in a sequence that has none.
        """
        if self.config.eos_token_id == _HISTORICAL_EOS_TOKEN_ID:
            return input_ids.argmax(-1)
        return (input_ids == self.config.eos_token_id).int().argmax(-1)
