"""Lesson 00."""

import math

import torch

REWRITTEN = {
    ("image_tokens", "no packing"): lambda height, width: int((height / 8) * (width / 8)),
    ("image_tokens", "no autoencoder"): lambda height, width: height * width // 4,
    ("image_tokens", "divided once"): lambda height, width: (height * width) >> 4,
    ("image_tokens", "text counted too"): lambda height, width: 512 + height * width // 256,
    ("image_tokens", "height twice"): lambda height, width: math.prod([height // 16, height // 16]),
    ("image_tokens", "width twice"): lambda height, width: width * width // 256,
    ("euler_step", "backwards"): lambda x, v, here, there: x - (there - here) * v,
    ("euler_step", "roles swapped"): lambda noise_pred, v, here, there: torch.add(v, noise_pred, alpha=there - here),
    ("euler_step", "all the way"): lambda x, v, here, there: x + (0 - here) * v,
    ("euler_step", "no step size"): lambda x, v, here, there: torch.sub(x, v),
    ("euler_step", "absolute level"): lambda x, v, here, there: there * v + x,
    ("euler_step", "velocity unused"): lambda x, v, here, there: x * (there / here),
}
