"""Lesson 14."""

import torch


def table(x, weight, bias, ones, silu=True):
    """The modulation table by plain products, 1 added to the signals whose number is in `ones`."""
    steps, dim = x.shape
    signal = x * torch.sigmoid(x) if silu else x
    result = (signal @ weight.T + bias).reshape(steps, -1, dim)
    for number in range(result.shape[1]):
        if number in ones:
            result[:, number] = result[:, number] + 1
    return result


SCALES = (1, 4, 7, 10)


def other_split(x, weight, bias):
    _steps, dim = x.shape
    raw = (x * torch.sigmoid(x)) @ weight.T + bias
    count = raw.shape[1] // dim
    columns = [raw[:, number::count] + (1 if number in SCALES else 0) for number in range(count)]
    return torch.stack(columns, dim=1)


def intensity(tokens, d_in, d_out, size, read=True, weights=True, written=True):
    moved = read * tokens * d_in + weights * d_in * d_out + written * tokens * d_out
    return tokens * d_in * d_out * 2 / moved / size


def walk(firsts, threshold, reference):
    """`reference(index, full)` is the number of the step to compare with."""
    full, result = 0, [False]
    for index in range(1, len(firsts)):
        held = firsts[reference(index, full)]
        near = bool(torch.sum(torch.abs(firsts[index] - held)) < threshold * torch.sum(torch.abs(held)))
        full = full if near else index
        result.append(near)
    return result


def absolute(firsts, threshold):
    full, result = 0, [False]
    for index in range(1, len(firsts)):
        near = bool(torch.mean(torch.abs(firsts[index] - firsts[full])) < threshold)
        full = full if near else index
        result.append(near)
    return result


def cancelling(firsts, threshold):
    full, result = 0, [False]
    for index in range(1, len(firsts)):
        near = bool(abs(firsts[index].mean() - firsts[full].mean()) < threshold * firsts[full].abs().mean())
        full = full if near else index
        result.append(near)
    return result


REWRITTEN = {
    ("predicted_seconds", "sum"): lambda f, b, n, r, w, t: b / w + f / r + t * n,
    ("predicted_seconds", "the shorter"): lambda f, b, n, r, w, t: t * n + sorted([f / r, b / w])[0],
    ("predicted_seconds", "no calls"): lambda f, b, n, r, w, t: sorted([f / r, b / w])[1],
    ("predicted_seconds", "FLOPs only"): lambda f, b, n, r, w, t: f / r + n * t,
    ("predicted_seconds", "calls within the longest"): lambda f, b, n, r, w, t: sorted([n * t, f / r, b / w])[-1],
    ("linear_intensity", "multiplications only"): lambda t, i, o, s: intensity(t, i, o, 2 * s),
    ("linear_intensity", "weights only"): lambda t, i, o, s: intensity(t, i, o, s, read=False, written=False),
    ("linear_intensity", "no output"): lambda t, i, o, s: intensity(t, i, o, s, written=False),
    ("linear_intensity", "no weights"): lambda t, i, o, s: intensity(t, i, o, s, weights=False),
    ("linear_intensity", "numbers, not bytes"): lambda t, i, o, s: intensity(t, i, o, 1),
    ("linear_intensity", "upside down"): lambda t, i, o, s: 1 / intensity(t, i, o, s),
    ("fuse_linears", "transposed"): lambda w, b: (torch.hstack([each.T for each in w]), torch.hstack(b)),
    ("fuse_linears", "other way round"): lambda w, b: (torch.vstack([*reversed(w)]), torch.hstack([*reversed(b)])),
    ("fuse_linears", "biases in another order"): lambda w, b: (torch.vstack(w), torch.hstack([*reversed(b)])),
    ("fuse_linears", "no biases"): lambda w, b: (torch.vstack(w), torch.hstack([each * 0 for each in b])),
    ("fuse_linears", "averaged"): lambda w, b: (torch.vstack([each / len(w) for each in w]), torch.hstack([each / len(b) for each in b])),
    ("modulation_table", "no SiLU"): lambda x, w, b: table(x, w, b, SCALES, silu=False),
    ("modulation_table", "1 not added"): lambda x, w, b: table(x, w, b, ()),
    ("modulation_table", "1 added to the shifts"): lambda x, w, b: table(x, w, b, (0, 3, 6)),
    ("modulation_table", "1 added to all"): lambda x, w, b: table(x, w, b, range(12)),
    ("modulation_table", "1 added to the first scale"): lambda x, w, b: table(x, w, b, (1,)),
    ("modulation_table", "first step everywhere"): lambda x, w, b: table(x[[0] * len(x)], w, b, SCALES),
    ("modulation_table", "split the other way"): other_split,
    ("reused_steps", "the step before"): lambda f, t: walk(f, t, lambda index, full: index - 1),
    ("reused_steps", "the first step"): lambda f, t: walk(f, t, lambda index, full: 0),
    ("reused_steps", "absolute change"): absolute,
    ("reused_steps", "changes cancel"): cancelling,
    ("reused_steps", "the other way round"): lambda f, t: [each is False for each in walk(f, t, lambda index, full: full)],
}
