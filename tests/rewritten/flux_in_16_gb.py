"""Lesson 13."""

import math

import numpy as np
import torch


def absmax_of(x, dim):
    return torch.from_numpy(np.abs(x.float().numpy()).max(axis=dim))


def codes(x, absmax, rounding=torch.round):
    return rounding(127 * x.float() / torch.where(absmax == 0, torch.ones_like(absmax), absmax)).char()


def rows(x):
    absmax = absmax_of(x, 1)
    return codes(x, absmax.unsqueeze(1)), absmax


def without(x, columns):
    kept = x.clone()
    kept[:, columns] = 0
    return [torch.tensor(columns, dtype=torch.int64), *rows(kept)]


def channels(x, threshold, is_outlier):
    return [channel for channel in range(x.shape[1]) if is_outlier(x[:, channel], threshold)]


def any_large(column, threshold):
    return any(abs(value) >= threshold for value in column.tolist())


def tokens_removed(x, threshold):
    tokens = [token for token in range(len(x)) if any_large(x[token], threshold)]
    kept = x.clone()
    kept[tokens] = 0
    return [torch.tensor(tokens, dtype=torch.int64), *rows(kept)]


def scale_first(x, threshold):
    columns, absmax = channels(x, threshold, any_large), absmax_of(x, 1)
    kept = x.clone()
    kept[:, columns] = 0
    return [torch.tensor(columns, dtype=torch.int64), codes(kept, absmax.unsqueeze(1)), absmax]


def split(packed, order="upper lower"):
    halves = {"upper": packed // 16, "lower": packed % 16}
    return torch.stack([halves[name] for name in order.split()], dim=1).reshape(-1).long()


def nf4(indices, absmax, code, block=64):
    return torch.stack([code[index] * absmax[place // block] for place, index in enumerate(indices.tolist())])


def size(count, scheme, rows, **changes):
    parts = {"codes": count * {"bf16": 16, "int8": 8, "nf4": 4}[scheme] / 8, "scales": {"int8": 4 * rows}.get(scheme, 0)}
    if scheme == "nf4":
        blocks = math.ceil(count / 64)
        parts |= {"scales": blocks, "nested": 4 * math.ceil(blocks / 256), "offset": 4}
    return int(sum((parts | changes).values()))


REWRITTEN = {
    ("staged_peak", "everything loaded"): lambda s: sum(w for w, _ in s.values()) + max(a for _, a in s.values()),
    ("staged_peak", "sum of all stages"): lambda s: int(np.array(list(s.values())).sum()),
    ("staged_peak", "weights only"): lambda s: sorted(w for w, _ in s.values())[-1],
    ("staged_peak", "largest of each"): lambda s: int(np.array(list(s.values())).max(axis=0).sum()),
    ("linear_bytes", "no scales"): lambda r, c, s: r * c // 2 if s == "nf4" else r * c * (1 + (s == "bf16")),
    ("linear_bytes", "bits"): lambda r, c, s: size(r * c, s, r) << 3,
    ("linear_bytes", "one scale for the matrix"): lambda r, c, s: size(r * c, s, 1),
    ("linear_bytes", "a scale for each column"): lambda r, c, s: size(r * c, s, c),
    ("linear_bytes", "no double quantization"): lambda r, c, s: (
        size(r * c, s, r) if s != "nf4" else size(r * c, s, r, scales=4 * math.ceil(r * c / 64), nested=0, offset=0)
    ),
    ("linear_bytes", "the offset forgotten"): lambda r, c, s: size(r * c, s, r) - 4 * (s == "nf4"),
    ("quantize_to_rows", "one scale for the matrix"): lambda x: (codes(x, x.float().abs().max()), x.float().abs().max().repeat(len(x))),
    ("quantize_to_rows", "a scale for each column"): lambda x: (codes(x, absmax_of(x, 0)), absmax_of(x, 0)),
    ("quantize_to_rows", "cut off"): lambda x: (codes(x, absmax_of(x, 1).unsqueeze(1), torch.fix), absmax_of(x, 1)),
    ("quantize_to_rows", "steps in place of maxima"): lambda x: (rows(x)[0], absmax_of(x, 1) / 127),
    ("split_outliers", "tokens in place of channels"): tokens_removed,
    ("split_outliers", "negative ones overlooked"): lambda x, t: without(x, channels(x, t, lambda column, t: bool(column.max() >= t))),
    ("split_outliers", "large in every token"): lambda x, t: without(x, channels(x, t, lambda column, t: bool((column.abs() >= t).all()))),
    ("split_outliers", "scaled before the split"): scale_first,
    ("split_outliers", "outliers left in"): lambda x, t: [torch.tensor(channels(x, t, any_large), dtype=torch.int64), *rows(x)],
    ("unpack_nf4", "lower half first"): lambda p, a, c: nf4(split(p, "lower upper"), a, c),
    ("unpack_nf4", "halves one after the other"): lambda p, a, c: nf4(split(p).view(-1, 2).T.reshape(-1), a, c),
    ("unpack_nf4", "even levels"): lambda p, a, c: nf4(split(p), a, 2 * torch.arange(16) / 15 - 1),
    ("unpack_nf4", "a scale for 64 bytes"): lambda p, a, c: nf4(split(p), a, c, block=128),
}
