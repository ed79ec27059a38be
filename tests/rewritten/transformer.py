"""Lesson 08."""

import functools

import torch


def joint(text, image, double, single):
    """Both streams behind the last block."""
    text, image = functools.reduce(lambda both, block: block(*both), double, (text, image))
    both = functools.reduce(lambda sequence, block: block(sequence), single, torch.hstack([text, image]))
    return both.split([text.shape[1], image.shape[1]], dim=1)


def image_in_front(text, image, double, single):
    text, image = joint(text, image, double, [])
    _, behind = joint(torch.zeros_like(image[:, :0]), torch.hstack([image, text]), [], single)
    return behind[:, : image.shape[1]]


def mixed_up(text, image, double, single):
    for block in double:
        image, text = tuple(block(text, image))
    return joint(text, image, [], single)[1]


REWRITTEN = {
    ("double_block_parameters", "one stream"): lambda d, h: 18 * d * d + 15 * d + 2 * h,
    ("double_block_parameters", "no biases"): lambda d, h: 2 * (6 * d * d + 4 * d * d + 8 * d * d + 2 * h),
    ("double_block_parameters", "three signals"): lambda d, h: 30 * d * d + 24 * d + 4 * h,
    ("double_block_parameters", "no query and key norms"): lambda d, h: 36 * d * d + 30 * d,
    ("double_block_parameters", "layer norms with weights"): lambda d, h: 36 * d * d + 38 * d + 4 * h,
    ("double_block_parameters", "narrow MLP"): lambda d, h: 24 * d * d + 24 * d + 4 * h,
    ("attention_product_flops", "half of it"): lambda t, n, d: (t + n) * (t + n) * d + (t + n) * d * (t + n),
    ("attention_product_flops", "image only"): lambda t, n, d: 2 * (2 * t * t * d),
    ("attention_product_flops", "two separate attentions"): lambda t, n, d: sum(4 * each * each * d for each in (t, n)),
    ("attention_product_flops", "text as keys only"): lambda t, n, d: 4 * t * t * d + 4 * t * n * d,
    ("attention_product_flops", "grows with the width squared"): lambda t, n, d: 2 * 2 * d * d * (t + n),
    ("attention_product_flops", "with the linear layers"): lambda t, n, d: 4 * (t + n) * d * (t + n + 2 * d),
    ("run_blocks", "text kept"): lambda *given: torch.cat(joint(*given), dim=1),
    ("run_blocks", "wrong end"): lambda *given: torch.cat(joint(*given), dim=1)[:, : given[1].shape[1]],
    ("run_blocks", "image first"): image_in_front,
    ("run_blocks", "text not joined"): lambda text, image, double, single: joint(
        text[:, :0], joint(text, image, double, [])[1], [], single
    )[1],
    ("run_blocks", "results swapped"): mixed_up,
    ("run_blocks", "single blocks skipped"): lambda text, image, double, single: joint(text, image, double, ())[1],
}
