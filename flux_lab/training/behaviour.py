"""What the parts and the knobs of a checkpoint do, in numbers: every block taken out, guidance and steps varied, two prompts at odds.

Measured by `python -m flux_lab.training.evaluate --behaviour PROMPTS`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from flux_lab import shapes
from flux_lab.pipeline import FluxPipeline
from flux_lab.training.captions import ATTRIBUTES, Caption, Stated
from flux_lab.training.flow import predict_velocity
from flux_lab.training.obedience import score
from flux_lab.training.reader import Reader, read_attributes
from flux_lab.transformer import named_blocks

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1)
GUIDANCES = (1.0, 2.0, 3.5, 5.0)
STEPS = (2, 4, 8, 16, 28)
Generate = Callable[..., UInt8[np.ndarray, "prompts height width 3"]]


@contextlib.contextmanager
def without(block: nn.Module) -> Iterator[None]:
    """Inside the `with` block this block hands on both streams, (text, image), as they came."""
    block.forward = lambda hidden_states, encoder_hidden_states, *_, **__: (encoder_hidden_states, hidden_states)
    try:
        yield
    finally:
        del block.forward


@torch.no_grad()
def block_effects(
    pipe: FluxPipeline, prompts: Sequence[str], latents: Float[Tensor, "prompts channels rows columns"], guidance: float, seed: int = 0
) -> dict[str, list[float]]:
    """How much the velocity changes when a block is taken out, relative to its norm: block -> a number for each of `SIGMAS`.

    The velocity is asked for on the straight path from the given `latents` (scaled, one of each prompt) to noise.
    """
    transformer = pipe.transformer
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    t = torch.tensor(SIGMAS, device=latents.device).repeat_interleave(len(latents))
    x_t = torch.lerp(latents.repeat(len(SIGMAS), 1, 1, 1), noise.repeat(len(SIGMAS), 1, 1, 1), t[:, None, None, None])
    text = pipe.encode_prompt(list(prompts))
    embeddings = (text.prompt_embeds.repeat(len(SIGMAS), 1, 1), text.pooled_prompt_embeds.repeat(len(SIGMAS), 1))

    def velocity() -> Tensor:
        found = predict_velocity(transformer, x_t, t, embeddings, torch.full_like(t, guidance))
        return found.unflatten(0, (len(SIGMAS), len(latents))).flatten(1).double()

    with shapes.checks(enabled=False):
        whole, effects = velocity(), {}
        for name, block in tqdm(named_blocks(transformer).items(), desc="taking blocks out", mininterval=2):
            with without(block):
                effects[name] = ((velocity() - whole).norm(dim=1) / whole.norm(dim=1)).tolist()
    return effects


def share_right(scores: Sequence[dict[str, bool]]) -> float:
    """The share of all stated facts that are right."""
    rights = [right for each in scores for right in each.values()]
    return sum(rights) / len(rights)


def left_open(stated: Stated, shown: Stated) -> dict[str, Any]:
    """What a picture shows of the things that its text does not say: the floor, and the attributes that it states of no object."""
    names = [name for name in ATTRIBUTES if not any(getattr(each, name) for each in stated.objects)]
    found = {name: sorted(getattr(each, name) for each in shown.objects) for name in names}
    return found if stated.floor else found | {"floor": shown.floor}


def diversity(stated: Sequence[Caption], shown: Sequence[Sequence[Stated]]) -> float | None:
    """How often two seeds differ in a thing that the prompt leaves open; None when no prompt leaves any. `shown`: prompts x seeds."""
    found = [[left_open(each.stated, one) for one in seeds] for each, seeds in zip(stated, shown, strict=True)]
    differ = [one[name] != other[name] for seeds in found for one, other in combinations(seeds, 2) for name in one]
    return sum(differ) / len(differ) if differ else None


def guidance_sweep(generate: Generate, reader: Reader, stated: Sequence[Caption], seeds: int = 4) -> dict[str, dict[str, float | None]]:
    """Guidance scale -> the share of stated facts that are right, and the diversity over seeds. Every prompt is drawn `seeds` times."""
    repeated = [each for each in stated for _ in range(seeds)]
    found = {}
    for guidance in GUIDANCES:
        shown = read_attributes(reader, generate([each.text for each in repeated], guidance_scale=guidance))
        rights = [score(each.stated, one) for each, one in zip(repeated, shown, strict=True)]
        found[f"{guidance:g}"] = {
            "right": share_right(rights),
            "diversity": diversity(stated, [shown[start : start + seeds] for start in range(0, len(shown), seeds)]),
        }
    return found


def step_sweep(generate: Generate, reader: Reader, stated: Sequence[Caption]) -> dict[str, float]:
    """Number of steps -> the share of stated facts that are right, from the same seeds."""
    found = {}
    for steps in STEPS:
        images = generate([each.text for each in stated], num_inference_steps=steps)
        found[str(steps)] = share_right(
            [score(each.stated, shown) for each, shown in zip(stated, read_attributes(reader, images), strict=True)]
        )
    return found


def conflict(generate: Generate, reader: Reader, stated: Sequence[Caption]) -> dict[str, Any]:
    """prompt (CLIP) says one caption, prompt_2 (T5) the next one: the share of each one's facts in the pictures, and which has more."""
    others = [*stated[1:], stated[0]]
    images = generate([each.text for each in stated], [each.text for each in others])
    shown = read_attributes(reader, images)
    scores = {
        name: [score(each.stated, read) for each, read in zip(captions, shown, strict=True)]
        for name, captions in (("prompt", stated), ("prompt_2", others))
    }
    shares = [[share_right([each]) for each in scores[name]] for name in scores]
    wins = {name: sum(a > b for a, b in zip(*order, strict=True)) for name, order in (("prompt", shares), ("prompt_2", shares[::-1]))}
    return {
        "pictures": len(images),
        "right": {name: share_right(each) for name, each in scores.items()},
        "wins": wins,
        "ties": len(images) - sum(wins.values()),
    }
