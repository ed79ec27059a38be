"""Lesson 07."""

import torch
import torch.nn.functional as F


def parts(attention, mlp, weight):
    dim = attention.shape[-1]
    return attention @ weight[:, :dim].T, mlp @ weight[:, dim:].T


def update(s, a, m, w, b, g, bias=1.0):
    first, second = parts(a, m, w)
    return torch.einsum("bsd,bd->bsd", first + second + bias * b, g)


def swapped(s, a, m, w, b, g):
    hidden = m.shape[-1]
    return s + torch.einsum("bsd,bd->bsd", m @ w[:, :hidden].T + a @ w[:, hidden:].T + b, g)


def one_gate(s, a, m, w, b, g):
    first, second = parts(a * g.unsqueeze(1), m, w)
    return first + second + b + s


def two_linears(s, a, m, w, b, g):
    dim, g = a.shape[-1], g.unsqueeze(1)
    return s + g * F.linear(a, w[:, :dim], b) + g * F.linear(m, w[:, dim:], b)


def bent(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def unit(x, dim=-1):
    return x / x.norm(dim=dim, keepdim=True)


def dot(x, y, dim=-1):
    return (unit(x, dim) * unit(y, dim)).sum(dim)


def degrees(cosine):
    return torch.acos(cosine) * 180 / torch.pi


def quarter(p, asks, asked):
    return torch.stack([head[asks, asked] for head in p])


REWRITTEN = {
    ("parallel_update", "MLP first"): swapped,
    ("parallel_update", "no residual"): update,
    ("parallel_update", "gate on the stream"): lambda s, a, m, w, b, g: update(s, a, m, w, b, g) + s * g.unsqueeze(1),
    ("parallel_update", "gate on attention"): one_gate,
    ("parallel_update", "bias not gated"): lambda s, a, m, w, b, g: update(s, a, m, w, b, g, bias=0.0) + (s + b),
    ("parallel_update", "bias twice"): two_linears,
    ("parallel_update", "GELU again"): lambda s, a, m, w, b, g: s + update(s, a, bent(m), w, b, g),
    ("direction_change", "radians"): lambda x, y: dot(x, y).acos().mean(),
    ("direction_change", "the cosine"): lambda x, y: dot(x, y).mean(),
    ("direction_change", "cosines averaged"): lambda x, y: degrees(dot(x, y).mean()),
    ("direction_change", "one long vector"): lambda x, y: degrees((x * y).sum() / (x.norm() * y.norm())),
    ("direction_change", "tokens averaged"): lambda x, y: degrees(dot(x.sum(1), y.sum(1))).mean(),
    ("direction_change", "angle of the update"): lambda x, y: degrees(dot(y - x, x)).mean(),
    ("direction_change", "channel by channel"): lambda x, y: degrees(dot(x, y, 1)).mean(),
    ("text_share", "the text asks"): lambda p, n: 1 - quarter(p, slice(n), slice(n)).sum(-1).mean(),
    ("text_share", "everyone asks"): lambda p, n: 1 - p[..., n:].sum(-1).mean(),
    ("text_share", "mean over the keys"): lambda p, n: quarter(p, slice(n, None), slice(n)).mean((0, 1, 2)),
    ("text_share", "the picture's own share"): lambda p, n: 1 - quarter(p, slice(n, None), slice(n)).sum(-1).mean(),
    ("text_share", "sum over the queries"): lambda p, n: quarter(p, slice(n, None), slice(n)).transpose(1, 2).sum(-1).mean(),
    ("text_share", "everything summed"): lambda p, n: sum(quarter(p, slice(n, None), slice(n)).flatten()),
}
