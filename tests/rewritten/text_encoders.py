"""Lesson 02."""

import math

import torch


def erf_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def end_of(ids, eos):
    return [row.tolist().index(eos) for row in ids]


def mean_of_text(states, ids, eos):
    return torch.stack([state[: end + 1].mean(0) for state, end in zip(states, end_of(ids, eos), strict=True)])


def attention(queries, keys, values, bias, axis=-1):
    weights = torch.exp(torch.einsum("bhqd,bhkd->bhqk", queries, keys) + bias)
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(axis, keepdim=True), values)


def bias_behind(queries, keys, values, bias):
    return attention(queries, keys, values, torch.zeros_like(bias)) + bias @ values


def causal(queries, keys, values, bias):
    rows = [
        attention(
            queries[:, :, place : place + 1], keys[:, :, : place + 1], values[:, :, : place + 1], bias[:, :, place : place + 1, : place + 1]
        )
        for place in range(queries.shape[2])
    ]
    return torch.cat(rows, dim=2)


REWRITTEN = {
    ("quick_gelu", "gelu"): erf_gelu,
    ("quick_gelu", "tanh gelu"): tanh_gelu,
    ("quick_gelu", "silu"): lambda x: x / (1 + torch.exp(-x)),
    ("quick_gelu", "sigmoid only"): lambda x: 1 / (1 + torch.exp(-1.702 * x)),
    ("quick_gelu", "factor outside"): lambda x: 1.702 * x / (1 + torch.exp(-x)),
    ("pooled_vector", "last slot"): lambda states, ids, eos: states.flip(1)[:, 0],
    ("pooled_vector", "first slot"): lambda states, ids, eos: torch.stack([state[0] for state in states]),
    ("pooled_vector", "last word"): lambda states, ids, eos: torch.stack([s[e - 1] for s, e in zip(states, end_of(ids, eos), strict=True)]),
    ("pooled_vector", "mean of the text"): mean_of_text,
    ("pooled_vector", "mean of all"): lambda states, ids, eos: states.sum(1) / states.shape[1],
    ("pooled_vector", "first sequence's place"): lambda states, ids, eos: states[:, end_of(ids, eos)[0]],
    ("t5_attention", "scaled"): lambda q, k, v, bias: attention(q / q.shape[-1] ** 0.5, k, v, bias),
    ("t5_attention", "no bias"): lambda q, k, v, bias: attention(q, k, v, 0 * bias),
    ("t5_attention", "bias behind the softmax"): bias_behind,
    ("t5_attention", "causal"): causal,
    ("t5_attention", "softmax over queries"): lambda q, k, v, bias: attention(q, k, v, bias, axis=-2),
    ("t5_attention", "bias transposed"): lambda q, k, v, bias: attention(q, k, v, bias.transpose(2, 3)),
    ("repeat_for_images", "whole batch repeated"): lambda embeds, images: torch.cat([embeds] * images),
    ("repeat_for_images", "more tokens"): lambda embeds, images: torch.cat([embeds] * images, dim=1),
    ("repeat_for_images", "wider vectors"): lambda embeds, images: torch.cat([embeds] * images, dim=2),
    ("repeat_for_images", "new axis"): lambda embeds, images: torch.stack([embeds] * images, dim=1),
    ("repeat_for_images", "not repeated"): lambda embeds, images: embeds.clone(),
}
