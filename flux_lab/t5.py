"""T5's encoder: token ids in, one vector for every token out. These are the words that FLUX.1's transformer reads.

Differs from CLIP in every detail: no position embedding but a learned bias on the attention scores, which depends on the distance of
two tokens only; no causal mask; no 1/sqrt(head_dim); RMSNorm; a gated MLP; no biases in the linears. Names follow transformers
`models/t5/modeling_t5.py`. Dropout is left out.
"""

import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from flux_lab.config import T5Config
from flux_lab.shapes import shaped


def gelu_new(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016), step by step: `F.gelu(x, approximate="tanh")` rounds differently."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


@shaped
def relative_position_bucket(
    relative_position: Int[Tensor, "*shape"], num_buckets: int = 32, max_distance: int = 128
) -> Int[Tensor, "*shape"]:
    """The bucket, 0 to num_buckets - 1, of each distance `key position - query position`.

    Half of the buckets are for keys before the query, half for those after it. Of each half, the first half holds one distance each; the
    rest grow logarithmically up to `max_distance`, and everything farther falls into the last. Source: transformers
    `T5Attention._relative_position_bucket`, bidirectional (Raffel et al. 2020, section 2.1).
    """
    one_side = num_buckets // 2
    exact = one_side // 2
    distance = relative_position.abs()
    scale = math.log(max_distance / exact)
    # log(0) gives -inf and an undefined integer, at a distance where `exact` buckets are taken instead.
    logarithmic = exact + (torch.log(distance.float() / exact) / scale * (one_side - exact)).long()
    bucket = torch.where(distance < exact, distance, logarithmic.clamp(max=one_side - 1))
    return bucket + (relative_position > 0).long() * one_side


def clamp_fp16(hidden_states: Tensor) -> Tensor:
    """Under fp16, bring infinities back: limit to 1000 below the largest finite number if there is one, else leave all finite values."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    largest = torch.finfo(torch.float16).max
    limit = torch.where(torch.isinf(hidden_states).any(), largest - 1000, largest)
    return hidden_states.clamp(min=-limit, max=limit)


class T5LayerNorm(nn.Module):
    """RMSNorm: divide by the root of the mean square, multiply by a learned weight. No mean, no bias.

    The mean square is taken in fp32, and the result cast down before the weight is multiplied.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean_square = hidden_states.float().pow(2).mean(-1, keepdim=True)
        normed = hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            normed = normed.to(self.weight.dtype)
        return self.weight * normed


class T5Attend(nn.Module):
    """The attention product: softmax(Q K^T + position bias) V, every token sees every token.

    Has no parameters. It is a module so that a forward hook sees what comes in; from there `probabilities` gives the weights.
    """

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, position_bias: Tensor) -> Tensor:
        """Queries, keys, values and result: [batch, heads, length, head_dim]; position_bias: [1, heads, length, length]."""
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=position_bias, scale=1.0)

    def probabilities(self, queries: Tensor, keys: Tensor, position_bias: Tensor) -> Tensor:
        """How much each token (row) takes from each token (column): [batch, heads, length, length] in fp32, rows sum to 1."""
        return (queries.float() @ keys.float().mT + position_bias.float()).softmax(-1)


class T5Attention(nn.Module):
    """Multi-head self-attention with a relative position bias. The first layer of the stack owns the bias, all others are given it."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.config = config
        inner_dim = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner_dim, bias=False)
        self.k = nn.Linear(config.d_model, inner_dim, bias=False)
        self.v = nn.Linear(config.d_model, inner_dim, bias=False)
        self.o = nn.Linear(inner_dim, config.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.attend = T5Attend()

    def compute_bias(self, length: int) -> Tensor:
        """The number added to the score of each query (row) and key (column), [1, heads, length, length]. Only the first layer has it."""
        positions = torch.arange(length, device=self.relative_attention_bias.weight.device)
        distances = rearrange(positions, "key -> 1 key") - rearrange(positions, "query -> query 1")
        config = self.config
        buckets = relative_position_bucket(distances, config.relative_attention_num_buckets, config.relative_attention_max_distance)
        return rearrange(self.relative_attention_bias(buckets), "query key heads -> 1 heads query key").contiguous()

    def forward(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
        queries, keys, values = (
            rearrange(
                projection(hidden_states), "batch length (heads head_dim) -> batch heads length head_dim", heads=self.config.num_heads
            )
            for projection in (self.q, self.k, self.v)
        )
        attended = self.attend(queries, keys, values, position_bias)
        return self.o(rearrange(attended, "batch heads length head_dim -> batch length (heads head_dim)"))


class T5DenseGatedActDense(nn.Module):
    """Gated MLP (Shazeer 2020): one linear through GELU gates another, a third brings the product back."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = gelu_new(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        # `wo` may be in fp32 while all else is in fp16: see T5EncoderModel.
        return self.wo(gated.to(self.wo.weight.dtype))


class T5LayerSelfAttention(nn.Module):
    """Norm, attention, residual."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_relative_attention_bias)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
        return hidden_states + self.SelfAttention(self.layer_norm(hidden_states), position_bias)


class T5LayerFF(nn.Module):
    """Norm, MLP, residual."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(config)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.DenseReluDense(self.layer_norm(hidden_states))


class T5Block(nn.Module):
    """One layer: attention, then MLP."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, has_relative_attention_bias), T5LayerFF(config)])

    def forward(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return clamp_fp16(feed_forward(clamp_fp16(attention(hidden_states, position_bias))))


class T5Stack(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: T5Config, embed_tokens: nn.Embedding):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.block = nn.ModuleList(T5Block(config, has_relative_attention_bias=index == 0) for index in range(config.num_layers))
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embed_tokens(input_ids)
        position_bias = self.block[0].layer[0].SelfAttention.compute_bias(input_ids.shape[1])
        for block in self.block:
            hidden_states = block(hidden_states, position_bias)
        return self.final_layer_norm(hidden_states)


class T5EncoderModel(nn.Module):
    """T5's encoder.

    `shared` and `encoder.embed_tokens` are one module, so the state dict has their one weight under two keys; files usually hold it under
    `shared.weight` only.

    In fp16 the result of `wo` can be larger than the largest number. Whoever casts or loads the weights as fp16 keeps the modules named in
    `_keep_in_fp32_modules` in fp32, as transformers' `from_pretrained` does; the residual stream is then fp32 as well. After a plain
    `.half()`, `wo` is in fp16 and `clamp_fp16` limits the harm. bf16 has the range of fp32 and needs neither.
    """

    _keep_in_fp32_modules: ClassVar[tuple[str, ...]] = ("wo",)

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, self.shared)
        self.reset_parameters()

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build from an upstream `config.json`, already parsed. Raises ValueError for a setting that we do not support."""
        return cls(T5Config.from_dict(values))

    def reset_parameters(self) -> None:
        """Initialise as T5 does. The 1/sqrt(d_kv) that attention does not divide by sits in the initial size of `q`."""
        config = self.config
        nn.init.normal_(self.shared.weight)
        for block in self.encoder.block:
            attention, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            nn.init.normal_(attention.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
            nn.init.normal_(attention.o.weight, std=(config.num_heads * config.d_kv) ** -0.5)
            nn.init.normal_(mlp.wo.weight, std=config.d_ff**-0.5)
            for linear in (attention.k, attention.v, mlp.wi_0, mlp.wi_1):
                nn.init.normal_(linear.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=config.d_model**-0.5)

    @shaped
    def forward(self, input_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length joint_dim"]:
        """Encode token ids. Padding is not masked: FLUX.1 was trained with padding that attends and is attended to."""
        return self.encoder(input_ids)
