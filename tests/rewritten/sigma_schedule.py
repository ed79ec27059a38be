"""Lesson 09."""

import math

import numpy as np
import torch


def curve(sigma, strength):
    return strength / (strength + (1 / sigma - 1))


def levels(steps, mu):
    return torch.tensor([curve(1 - step / steps, math.exp(mu)) for step in range(steps)] + [0.0])


def short(steps, strength):
    return [curve(level, strength) if level else 0.0 for level in np.linspace(1, 0, steps).tolist()]


def each(picture, noise, sigma, mixed):
    return torch.stack([mixed(p, n, s) for p, n, s in zip(picture, noise, sigma, strict=True)])


REWRITTEN = {
    ("mu_for", "clamped"): lambda tokens: 0.5 + (tokens.clip(256, 4096) - 256) / 3840 * 0.65,
    ("mu_for", "from zero tokens"): lambda tokens: 0.5 + tokens * 0.65 / 3840,
    ("mu_for", "proportional"): lambda tokens: tokens / 4096 * 1.15,
    ("mu_for", "wrong maximum"): lambda tokens: 0.66 / 3840 * tokens + (0.5 - 0.66 / 15),
    ("mu_for", "side in place of tokens"): lambda tokens: 0.5 + 0.65 / 48 * (tokens**0.5 - 16),
    ("mu_for", "logarithm of tokens"): lambda tokens: 0.5 + 0.65 * torch.log2(tokens / 256) / 4,
    ("shift_sigmas", "mu itself"): lambda sigmas, mu: mu * sigmas / (1 + (mu - 1) * sigmas),
    ("shift_sigmas", "towards zero"): lambda sigmas, mu: 1 / (1 + math.exp(mu) * (1 / sigmas - 1)),
    ("shift_sigmas", "multiplied"): lambda sigmas, mu: sigmas / math.exp(-mu),
    ("shift_sigmas", "added"): lambda sigmas, mu: torch.add(sigmas, mu),
    ("shift_sigmas", "odds kept"): lambda sigmas, mu: math.exp(mu) * sigmas / (1 - sigmas),
    ("shift_sigmas", "without the one"): lambda sigmas, mu: math.exp(mu) * sigmas / (math.exp(mu) * sigmas + 1),
    ("noise_levels", "no final zero"): lambda steps, mu: levels(steps, mu)[:-1],
    ("noise_levels", "one step too few"): lambda steps, mu: torch.tensor(short(steps, math.exp(mu))),
    ("noise_levels", "not shifted"): lambda steps, mu: 1 - torch.arange(steps + 1) / steps,
    ("noise_levels", "shifted twice"): lambda steps, mu: levels(steps, mu + mu),
    ("noise_levels", "upwards"): lambda steps, mu: torch.tensor(levels(steps, mu).tolist()[::-1]),
    ("noise_levels", "timesteps"): lambda steps, mu: levels(steps, mu) * 1e3,
    ("add_noise", "roles swapped"): lambda x, n, sigma: each(x, n, sigma, lambda p, q, s: s * p + (1 - s) * q),
    ("add_noise", "picture not weakened"): lambda x, n, sigma: each(x, n, sigma, lambda p, q, s: p + s * q),
    ("add_noise", "constant variance"): lambda x, n, sigma: each(x, n, sigma, lambda p, q, s: p * torch.sqrt(1 - s * s) + s * q),
    ("add_noise", "square roots"): lambda x, n, sigma: each(x, n, sigma, lambda p, q, s: p * (1 - s) ** 0.5 + s**0.5 * q),
    ("add_noise", "first level for all"): lambda x, n, sigma: x + sigma[0] * (n - x),
}
