"""The exercises of lesson 02."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from flux_lab.clip import quick_gelu
from flux_lab.exercises.checking import Exercise, Misconception

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- CLIP's activation --------------------------------------------------------------------------------------------------


def activations() -> Iterator[dict[str, Any]]:
    for seed, (shape, dtype) in enumerate(zip(((2, 5, 8), (7, 3), (4, 6)), DTYPES, strict=True)):
        yield {"x": 3 * random(*shape, seed=seed, dtype=dtype)}


QUICK_GELU = Exercise(
    name="quick_gelu",
    reference=quick_gelu,
    cases=activations,
    misconceptions=(
        Misconception("gelu", lambda x: F.gelu(x), "this is the exact GELU. CLIP was trained with the approximation x · sigmoid(1.702 x)"),
        Misconception(
            "tanh gelu",
            lambda x: F.gelu(x, approximate="tanh"),
            "this is the tanh approximation of GELU. T5 has it, and FLUX.1's transformer; CLIP has x · sigmoid(1.702 x)",
        ),
        Misconception("silu", lambda x: F.silu(x), "the factor 1.702 is missing: x · sigmoid(x) is called SiLU"),
        Misconception("sigmoid only", lambda x: torch.sigmoid(1.702 * x), "you return the sigmoid. It is a gate: multiply it by x"),
        Misconception(
            "factor outside",
            lambda x: 1.702 * x * torch.sigmoid(x),
            "1.702 belongs inside of the sigmoid. It makes the gate steeper, not the result larger",
        ),
    ),
)


# ---- CLIP's one vector --------------------------------------------------------------------------------------------------


def pooled_vector(last_hidden_state: Tensor, input_ids: Tensor, eos_token_id: int) -> Tensor:
    """The vector at the first end token of each sequence."""
    return _at(last_hidden_state, (input_ids == eos_token_id).int().argmax(-1))


def _at(states: Tensor, places: Tensor) -> Tensor:
    return states[torch.arange(len(states)), places]


def mean_of_text(last_hidden_state: Tensor, input_ids: Tensor, eos_token_id: int) -> Tensor:
    """The mean from the start token to the first end token."""
    ends = (input_ids == eos_token_id).int().argmax(-1)
    inside = torch.arange(input_ids.shape[1]) <= rearrange(ends, "batch -> batch 1")
    weights = inside.double() / inside.sum(-1, keepdim=True)
    return torch.einsum("bl,bld->bd", weights.to(last_hidden_state.dtype), last_hidden_state)


def padded_ids(batch: int, length: int, eos_token_id: int, seed: int) -> Tensor:
    """Start, text of different lengths, end, and padding that is the end token again."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, eos_token_id - 1, (batch, length), generator=generator)
    ids[:, 0] = eos_token_id - 1
    for row in range(batch):
        ids[row, 3 + 2 * row :] = eos_token_id
    return ids


def encoded_prompts() -> Iterator[dict[str, Any]]:
    for seed, ((batch, length, dim), dtype) in enumerate(zip(((3, 11, 6), (2, 77, 8), (4, 12, 5)), DTYPES, strict=True)):
        ids = padded_ids(batch, length, eos_token_id=50 + seed, seed=seed)
        yield {"last_hidden_state": random(batch, length, dim, seed=seed, dtype=dtype), "input_ids": ids, "eos_token_id": 50 + seed}


POOLED_VECTOR = Exercise(
    name="pooled_vector",
    reference=pooled_vector,
    cases=encoded_prompts,
    misconceptions=(
        Misconception(
            "last slot",
            lambda last_hidden_state, input_ids, eos_token_id: last_hidden_state[:, -1],
            "you take the last slot. It holds padding. The vector to take is at the first end token, right behind the text",
        ),
        Misconception(
            "first slot",
            lambda last_hidden_state, input_ids, eos_token_id: last_hidden_state[:, 0],
            "you take the first slot, as BERT does. With a causal mask the start token has seen nothing but itself",
        ),
        Misconception(
            "last word",
            lambda last_hidden_state, input_ids, eos_token_id: _at(last_hidden_state, (input_ids == eos_token_id).int().argmax(-1) - 1),
            "you take the vector before the end token. The end token itself is the one to take",
        ),
        Misconception(
            "mean of the text",
            mean_of_text,
            "you take the mean of the text's vectors. Pooling in CLIP is no mean: it picks the vector of one token",
        ),
        Misconception(
            "mean of all",
            lambda last_hidden_state, input_ids, eos_token_id: last_hidden_state.mean(1),
            "you take the mean of all slots, padding too. Pooling in CLIP picks the vector of one token",
        ),
        Misconception(
            "first sequence's place",
            lambda last_hidden_state, input_ids, eos_token_id: last_hidden_state[:, (input_ids[0] == eos_token_id).int().argmax()],
            "you use one place for the whole batch. Every prompt ends at a place of its own",
        ),
    ),
)


# ---- T5's attention -----------------------------------------------------------------------------------------------------


def t5_attention(queries: Tensor, keys: Tensor, values: Tensor, position_bias: Tensor) -> Tensor:
    """softmax(Q K^T + bias) V, [batch, heads, length, head_dim]."""
    return (queries @ keys.mT + position_bias).softmax(-1) @ values


def heads() -> Iterator[dict[str, Tensor]]:
    for seed, (batch, count, length, head_dim) in enumerate(((2, 3, 5, 4), (1, 2, 9, 16), (3, 1, 6, 8))):
        dtype = (torch.float64, torch.float32, torch.float32)[seed]
        queries, keys, values = (random(batch, count, length, head_dim, seed=10 * seed + place, dtype=dtype) for place in range(3))
        bias = random(1, count, length, length, seed=10 * seed + 3, dtype=dtype)
        yield {"queries": queries, "keys": keys, "values": values, "position_bias": bias}


def scaled(queries: Tensor, keys: Tensor, values: Tensor, position_bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=position_bias)


def causal(queries: Tensor, keys: Tensor, values: Tensor, position_bias: Tensor) -> Tensor:
    future = torch.ones(position_bias.shape[-2:], dtype=torch.bool).triu(1)
    return t5_attention(queries, keys, values, position_bias.masked_fill(future, float("-inf")))


T5_ATTENTION = Exercise(
    name="t5_attention",
    reference=t5_attention,
    cases=heads,
    misconceptions=(
        Misconception("scaled", scaled, "you divide the scores by the root of the head width. T5 does not"),
        Misconception(
            "no bias",
            lambda queries, keys, values, position_bias: t5_attention(queries, keys, values, torch.zeros_like(position_bias)),
            "the position bias is missing. Without it T5 does not know the order of the words",
        ),
        Misconception(
            "bias behind the softmax",
            lambda queries, keys, values, position_bias: ((queries @ keys.mT).softmax(-1) + position_bias) @ values,
            "you add the bias behind the softmax. It is added to the scores, so that the weights still sum to 1",
        ),
        Misconception("causal", causal, "you hide the future. That is CLIP; in T5's encoder every token sees every token"),
        Misconception(
            "softmax over queries",
            lambda queries, keys, values, position_bias: (queries @ keys.mT + position_bias).softmax(-2) @ values,
            "your softmax runs over the queries. For each query the weights of all keys sum to 1: it runs over the last axis",
        ),
        Misconception(
            "bias transposed",
            lambda queries, keys, values, position_bias: t5_attention(queries, keys, values, position_bias.mT),
            "the bias is transposed: rows are queries, columns are keys. So a token behind is taken for one in front",
        ),
    ),
)


# ---- several images of one prompt ---------------------------------------------------------------------------------------


def repeat_for_images(prompt_embeds: Tensor, num_images_per_prompt: int) -> Tensor:
    """Each prompt's vectors `num_images_per_prompt` times, the copies next to each other."""
    return repeat(prompt_embeds, "batch length dim -> (batch images) length dim", images=num_images_per_prompt)


def embeds() -> Iterator[dict[str, Any]]:
    for seed, ((batch, length, dim), images) in enumerate((((3, 4, 2), 2), ((2, 5, 6), 3), ((1, 3, 8), 4))):
        yield {"prompt_embeds": random(batch, length, dim, seed=seed, dtype=DTYPES[seed]), "num_images_per_prompt": images}


REPEAT_FOR_IMAGES = Exercise(
    name="repeat_for_images",
    reference=repeat_for_images,
    cases=embeds,
    misconceptions=(
        Misconception(
            "whole batch repeated",
            lambda prompt_embeds, num_images_per_prompt: prompt_embeds.repeat(num_images_per_prompt, 1, 1),
            "your order is a, b, a, b. The copies of one prompt stand next to each other: a, a, b, b",
        ),
        Misconception(
            "more tokens",
            lambda prompt_embeds, num_images_per_prompt: prompt_embeds.repeat(1, num_images_per_prompt, 1),
            "you repeated the tokens, so every prompt says everything several times. It is the batch that grows",
        ),
        Misconception(
            "wider vectors",
            lambda prompt_embeds, num_images_per_prompt: prompt_embeds.repeat(1, 1, num_images_per_prompt),
            "you made the vectors wider. Their width is fixed by the encoder; it is the batch that grows",
        ),
        Misconception(
            "new axis",
            lambda prompt_embeds, num_images_per_prompt: repeat(prompt_embeds, "b l d -> b images l d", images=num_images_per_prompt),
            "there is an axis too many. Images of all prompts form one batch: merge the two axes",
        ),
        Misconception(
            "not repeated",
            lambda prompt_embeds, num_images_per_prompt: prompt_embeds,
            "nothing is repeated. For two images of each of three prompts the batch must be 6",
        ),
    ),
)

EXERCISES = (QUICK_GELU, POOLED_VECTOR, T5_ATTENTION, REPEAT_FOR_IMAGES)
