"""Stages 6 and 6b: guidance distillation, into a shallow transformer and then into the one that was grown from it.

    python -m flux_lab.training.guidance --initial runs/flow/transformer --teacher runs/flow/transformer --out runs/distilled
    python -m flux_lab.training.guidance --initial runs/grown/transformer --teacher runs/flow/transformer --out runs/deepened

The guidance embedding learns to do in one pass what true classifier-free guidance does in two, v_uncond + w (v_cond - v_uncond) with
w in [1, 6] (Meng et al. 2022, arXiv 2210.03142). The target is the teacher's velocity, which has none of the randomness of noise - x0.
In a noised picture the text's objects already stand where they belong, and there is little for guidance to do; so the student is taught
where its own steps bring it, from pure noise on (Ross et al. 2011, arXiv 1011.0686). Writes `transformer/` (a diffusers folder).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.checkpoints import load_clip, load_t5, load_transformer
from flux_lab.latents import pack_latents
from flux_lab.training.flow import (
    Encoders,
    FlowBatches,
    add_options,
    compile_blocks,
    export,
    image_ids,
    predict_packed_velocity,
    settings_of,
)
from flux_lab.training.loop import train
from flux_lab.transformer import FluxTransformer2DModel

STRONGEST = 6.0
STOPS = 4  # levels at which a picture on its way is asked for its velocity


class TaughtLoss(nn.Module):
    """A student, `transformer`, with its teacher and the encoders, which do not learn."""

    def __init__(self, transformer: FluxTransformer2DModel, teacher: FluxTransformer2DModel, encoders: Encoders):
        super().__init__()
        self.transformer, self.encoders = transformer, encoders
        self.teacher = teacher.eval().requires_grad_(False)

    def texts(
        self, clip_ids: Tensor, t5_ids: Tensor, no_clip: Tensor, no_t5: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The encoded captions, and the empty caption, encoded once, beside each of them."""
        text = self.encoders(clip_ids, t5_ids)
        empty = self.encoders(no_clip[:1], no_t5[:1])
        return text, tuple(one.expand_as(each) for one, each in zip(empty, text, strict=True))


class GuidanceLoss(TaughtLoss):
    """The student's velocity against the teacher's guided one, at every stop of the way that the student itself goes.

    The way begins with the picture noised to the first of `levels`, which fall. What guidance adds grows with its strength, and so does
    what can be wrong in it: errors are divided by the strength, or the strong ones would drown the rest. `off`: relative to the norm.
    """

    def forward(
        self,
        latents: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        levels: Float[Tensor, "batch stops"],
        clip_ids: Tensor,
        t5_ids: Tensor,
        no_clip: Tensor,
        no_t5: Tensor,
        guidance: Float[Tensor, "batch"],
    ) -> dict[str, Tensor]:
        (text, without), img_ids = self.texts(clip_ids, t5_ids, no_clip, no_t5), image_ids(latents)
        strength = guidance[:, None, None]
        x = pack_latents(torch.lerp(latents, noise, levels[:, 0, None, None, None]))
        errors, targets = [], []
        for stop, t in enumerate(levels.unbind(1)):
            if stop:
                x = x + (t - levels[:, stop - 1])[:, None, None] * velocity.detach()
            targets.append(guided_velocity(self.teacher, x, t, text, without, img_ids, strength))
            velocity = predict_packed_velocity(self.transformer, x, t, text, img_ids, guidance)
            errors.append(velocity - targets[-1])
        error, target = torch.stack(errors), torch.stack(targets)
        return {"loss": (error / strength).square().mean(), "off": error.norm() / target.norm()}


@torch.no_grad()
def guided_velocity(
    model: FluxTransformer2DModel,
    x_t: Float[Tensor, "batch tokens channels"],
    t: Tensor,
    text: Sequence,
    without: Sequence,
    img_ids: Tensor,
    strength: Tensor | float,
) -> Float[Tensor, "batch tokens channels"]:
    """The velocity of a model that was not distilled, with true guidance: with the text and with the empty one in one batch of two."""
    both = tuple(torch.cat(pair) for pair in zip(text, without, strict=True))
    twice = [torch.cat([value] * 2) for value in (x_t, t)]
    conditional, unconditional = predict_packed_velocity(model, *twice, both, img_ids, torch.ones_like(twice[1])).chunk(2)
    return torch.lerp(unconditional, conditional, strength)


class GuidanceBatches(FlowBatches):
    """Batches of the flow with several levels, which fall; the empty caption beside every caption; and a guidance strength.

    Every other way begins with pure noise. One in eight has strength 1; the others' lie mostly near the middle, 3.5.
    """

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch, count = super().__call__(step, generator), self.batch_size
        del batch["t"]
        levels = torch.rand(count, STOPS, generator=generator).sort(descending=True).values
        levels[::2, 0] = 1.0
        # The middle one of three even draws: the Beta(2, 2) distribution.
        middle = torch.rand(count, 3, generator=generator).median(dim=1).values
        guidance = 1 + (STRONGEST - 1) * middle * (torch.rand(count, generator=generator) >= 1 / 8)
        empty = {"no_clip": self.no_clip.repeat(count, 1), "no_t5": self.no_t5.repeat(count, 1)}
        return batch | empty | {"levels": self.shifted(levels), "guidance": guidance}


def train_student(
    loss: type[TaughtLoss],
    batches: type[GuidanceBatches],
    student: FluxTransformer2DModel,
    teacher: FluxTransformer2DModel,
    options: argparse.Namespace,
) -> None:
    """Train the student with one of the losses that have a teacher, and export it."""
    student.float().requires_grad_(True)
    if options.compile:
        compile_blocks(student)
    encoders = Encoders(load_clip(options.clip), load_t5(options.t5))
    drawn = batches(options.scenes, options.tokenizers, options.latents, options.batch)
    train(loss(student, teacher.float(), encoders), drawn, options.out, settings_of(options))
    export(options.out, student)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/distilled"))
    parser.add_argument("--initial", type=Path, default=Path("runs/flow/transformer"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/flow/transformer"), help="the rectified flow, not distilled")
    parser.add_argument("--rate", type=float, default=5e-4)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    student, teacher = (load_transformer(folder) for folder in (options.initial, options.teacher))
    train_student(GuidanceLoss, GuidanceBatches, student, teacher, options)


if __name__ == "__main__":
    main()
