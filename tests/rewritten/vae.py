"""Lesson 11."""

import torch
from torch import Tensor


def fade(left: Tensor, right: Tensor, overlap: int, weights: list[float], first: int, second: int) -> Tensor:
    """Column by column, starting at column `first` of `left` and `second` of `right`."""
    columns = [left[..., first + i] * (1 - weight) + right[..., second + i] * weight for i, weight in enumerate(weights)]
    return torch.cat([left[..., : left.shape[-1] - overlap], torch.stack(columns, dim=-1), right[..., overlap:]], dim=-1)


def forwards(overlap: int) -> list[float]:
    return [i / overlap for i in range(overlap)]


REWRITTEN = {
    ("unscale_latents", "shift first"): lambda z, scale, shift: z / scale + shift / scale,
    ("unscale_latents", "factor multiplied"): lambda z, scale, shift: shift + scale * z,
    ("unscale_latents", "scaled again"): lambda z, scale, shift: scale * (z - shift),
    ("unscale_latents", "shift with the wrong sign"): lambda z, scale, shift: -(shift - z / scale),
    ("unscale_latents", "no shift"): lambda z, scale, shift: z * (1 / scale),
    ("unscale_latents", "scale and shift swapped"): lambda z, scale, shift: scale + z / shift,
    ("kl_divergence", "logvar taken for the variance"): lambda mean, var: (mean.square() + var - torch.log(var) - 1).flatten(1).sum(1) / 2,
    ("kl_divergence", "logvar taken for the log of the deviation"): lambda mean, logstd: (
        (mean.square() + logstd.exp().square() - 1).flatten(1).sum(1) / 2 - logstd.flatten(1).sum(1)
    ),
    ("kl_divergence", "averaged"): lambda mean, logvar: torch.mean(mean.pow(2) + logvar.exp() - logvar - 1, dim=[-1, -2, -3]) / 2,
    ("kl_divergence", "batch summed too"): lambda mean, logvar: torch.sum(mean.pow(2) + logvar.exp() - logvar - 1) / 2,
    ("kl_divergence", "the other way round"): lambda mean, logvar: torch.distributions.kl_divergence(
        torch.distributions.Normal(torch.zeros_like(mean), 1.0), torch.distributions.Normal(mean, (logvar / 2).exp())
    ).sum((1, 2, 3)),
    ("kl_divergence", "sign"): lambda mean, logvar: (1 + logvar - mean.pow(2) - logvar.exp()).flatten(1).sum(1) / 2,
    ("kl_divergence", "half forgotten"): lambda mean, logvar: torch.sum(mean.pow(2) + logvar.exp() - logvar - 1, dim=(1, 2, 3)),
    ("to_bytes", "cut off"): lambda x: ((x + 1) * 127.5).clamp(0, 255).floor().byte(),
    ("to_bytes", "no clamp"): lambda x: ((x + 1) * 127.5).round().to(torch.int32).remainder(256).byte(),
    ("to_bytes", "taken for 0 to 1"): lambda x: (x * 255).round().clamp(min=0, max=255).byte(),
    ("to_bytes", "256"): lambda x: ((x + 1) * 128).round().clamp(0, 255).byte(),
    ("to_bytes", "clamped too early"): lambda x: ((x.clamp(0, 1) + 1) * 127.5).round().byte(),
    ("join_tiles", "side by side"): lambda left, right, overlap: torch.concat((left, right), -1),
    ("join_tiles", "left wins"): lambda left, right, overlap: fade(left, right, overlap, [0.0] * overlap, -overlap, 0),
    ("join_tiles", "right wins"): lambda left, right, overlap: fade(left, right, overlap, [1.0] * overlap, -overlap, 0),
    ("join_tiles", "averaged"): lambda left, right, overlap: fade(left, right, overlap, [0.5] * overlap, -overlap, 0),
    ("join_tiles", "faded backwards"): lambda left, right, overlap: fade(
        left, right, overlap, [1 - weight for weight in forwards(overlap)], -overlap, 0
    ),
    ("join_tiles", "wrong columns"): lambda left, right, overlap: fade(left, right, overlap, forwards(overlap), 0, -overlap),
}
