"""Lesson 10."""

import torch


def stepping(change, level):
    """A loop whose step size and level are chosen by (index, sigmas)."""

    def answer(velocity_at, latents, sigmas):
        x = latents.clone()
        for i in range(len(sigmas) - 1):
            x = torch.add(x, velocity_at(x, level(i, sigmas)) * change(i, sigmas))
        return x

    return answer


def from_the_start(velocity_at, latents, sigmas):
    x = latents.clone()
    for i in range(len(sigmas) - 1):
        x = x - (sigmas[i] - sigmas[i + 1]) * velocity_at(latents, sigmas[i])
    return x


def too_short(velocity_at, latents, sigmas):
    x = latents.clone()
    for i in range(len(sigmas) - 2):
        x = x - (sigmas[i] - sigmas[i + 1]) * velocity_at(x, sigmas[i])
    return x


REWRITTEN = {
    ("predicted_picture", "sigma forgotten"): lambda x, v, sigma: -(v - x),
    ("predicted_picture", "towards the noise"): lambda x, v, sigma: torch.add(x, v, alpha=sigma),
    ("predicted_picture", "the rest to the noise"): lambda x, v, sigma: x + (sigma - 1) * v,
    ("predicted_picture", "the noise"): lambda x, v, sigma: x + v - sigma * v,
    ("predicted_picture", "velocity taken for the noise"): lambda x, v, sigma: (x - v * sigma) / ((1 - sigma) or 1),
    ("predicted_picture", "velocity taken for the picture"): lambda x, v, sigma: v + 0 * x,
    ("true_cfg", "starts from the positive"): lambda pos, neg, scale: (1 + scale) * pos - scale * neg,
    ("true_cfg", "roles swapped"): lambda pos, neg, scale: pos * (1 - scale) + scale * neg,
    ("true_cfg", "negative subtracted whole"): lambda pos, neg, scale: -(neg - scale * pos),
    ("true_cfg", "only the difference"): lambda pos, neg, scale: (pos - neg) * scale,
    ("true_cfg", "averaged"): lambda pos, neg, scale: neg + scale / (1 + scale) * (pos - neg),
    ("network_passes", "guidance doubles"): lambda steps, guidance, cfg, negative: 2 * steps if guidance > 1 else steps,
    ("network_passes", "never doubles"): lambda steps, guidance, cfg, negative: len(range(steps)),
    ("network_passes", "the scale alone"): lambda steps, guidance, cfg, negative: steps + steps * int(cfg > 1),
    ("network_passes", "the negative prompt alone"): lambda steps, guidance, cfg, negative: steps + steps * int(negative is not None),
    ("network_passes", "an empty negative prompt is none"): lambda steps, guidance, cfg, negative: (
        2 * steps if negative and cfg > 1.0 else steps
    ),
    ("network_passes", "any scale but 1"): lambda steps, guidance, cfg, negative: steps if cfg == 1 or negative is None else steps + steps,
    ("denoise", "backwards"): stepping(lambda i, sigmas: sigmas[i] - sigmas[i + 1], lambda i, sigmas: sigmas[i]),
    ("denoise", "asked at the next level"): stepping(lambda i, sigmas: sigmas[i + 1] - sigmas[i], lambda i, sigmas: sigmas[i + 1]),
    ("denoise", "asked once"): lambda velocity_at, x, sigmas: x - velocity_at(x, sigmas[0]) * (sigmas[0] - sigmas[-1]),
    ("denoise", "asked about the start"): from_the_start,
    ("denoise", "last step missing"): too_short,
    ("denoise", "jumping to the end"): stepping(lambda i, sigmas: -sigmas[i], lambda i, sigmas: sigmas[i]),
}
