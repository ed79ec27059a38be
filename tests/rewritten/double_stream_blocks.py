"""Lesson 06."""

import torch
import torch.nn.functional as F
from torch import nn


def scaled(x, weight, dim):
    return x / x.pow(2).mean(dim=dim, keepdim=True).add(1e-6).sqrt() * weight


def attention(q, k, v, scale=None, transposed=False):
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if transposed:
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=2)
        return (weights @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def both(output, length):
    return tuple(output.flatten(2).split([length, output.shape[1] - length], dim=1))


def masked(q, k, v, length, same):
    text = torch.arange(q.shape[1]) < length
    allowed = (text[:, None] == text[None, :]) == same
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return both(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2), length)


def by_loop(take, rows, columns):
    return torch.stack([torch.stack([take(row, column) for column in range(columns)]) for row in range(rows)])


REWRITTEN = {
    ("head_rms_norm", "all heads together"): lambda x, weight: scaled(x.flatten(2), 1, 2).reshape(x.shape) * weight,
    ("head_rms_norm", "over the tokens"): lambda x, weight: scaled(x, weight, 1),
    ("head_rms_norm", "mean removed"): lambda x, weight: scaled(x - x.mean(3, keepdim=True), weight, 3),
    ("head_rms_norm", "sum in place of the mean"): lambda x, weight: weight * x / torch.linalg.vector_norm(x, dim=3, keepdim=True),
    ("head_rms_norm", "no root"): lambda x, weight: weight * x * x.shape[3] / x.pow(2).sum(3, keepdim=True),
    ("head_rms_norm", "no weight"): lambda x, weight: nn.RMSNorm(x.shape[3], eps=1e-6, elementwise_affine=False)(x),
    ("head_rms_norm", "1 + weight"): lambda x, weight: scaled(x, weight, 3) + scaled(x, 1, 3),
    ("joint_attention", "each stream alone"): lambda q, k, v, length: masked(q, k, v, length, same=True),
    ("joint_attention", "cross attention"): lambda q, k, v, length: masked(q, k, v, length, same=False),
    ("joint_attention", "no scale"): lambda q, k, v, length: both(attention(q, k, v, scale=1.0), length),
    ("joint_attention", "divided by head_dim"): lambda q, k, v, length: both(attention(q, k, v, scale=1 / q.shape[3]), length),
    ("joint_attention", "root of the whole width"): lambda q, k, v, length: both(attention(q, k, v, scale=q[0, 0].numel() ** -0.5), length),
    ("joint_attention", "softmax over the queries"): lambda q, k, v, length: both(attention(q, k, v, transposed=True), length),
    ("joint_attention", "heads interleaved"): lambda q, k, v, length: both(attention(q, k, v).transpose(2, 3), length),
    ("joint_attention", "image first"): lambda q, k, v, length: both(attention(q, k, v), length)[::-1],
    ("word_to_picture", "the word asks"): lambda p, token, length, rows, columns: by_loop(
        lambda row, column: p[:, token, length + row * columns + column].mean(), rows, columns
    ),
    ("word_to_picture", "text not skipped"): lambda p, token, length, rows, columns: by_loop(
        lambda row, column: p[:, row * columns + column, token].mean(), rows, columns
    ),
    ("word_to_picture", "an image token as the word"): lambda p, token, length, rows, columns: by_loop(
        lambda row, column: p[:, length:, length:].mean(0)[row * columns + column, token], rows, columns
    ),
    ("word_to_picture", "columns first"): lambda p, token, length, rows, columns: by_loop(
        lambda row, column: p[:, length + column * rows + row, token].mean(), rows, columns
    ),
    ("word_to_picture", "heads added"): lambda p, token, length, rows, columns: by_loop(
        lambda row, column: p[:, length + row * columns + column, token].sum(), rows, columns
    ),
    ("word_to_picture", "first head only"): lambda p, token, length, rows, columns: by_loop(
        lambda row, column: p[0, length + row * columns + column, token], rows, columns
    ),
}
