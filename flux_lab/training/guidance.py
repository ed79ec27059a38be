"""Stage 6: guidance distillation.

    python -m flux_lab.training.guidance --initial runs/grown/transformer --teacher runs/flow/transformer --out runs/guided

The guidance embedding learns to do in one pass what true classifier-free guidance does in two, v_uncond + w (v_cond - v_uncond) with
w in [1, 6] (Meng et al. 2022, arXiv 2210.03142). The teacher gives the difference (w - 1) (v_cond - v_uncond); what it is added to is
not the teacher's v_cond but the velocity of the picture itself, noise - x0, whose mean v_cond is. So the student goes on learning from
pictures at every w (as in Tang et al. 2025, arXiv 2502.12154). The teacher may be shallower than the student. Writes `transformer/`.
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
    predict_velocity,
    settings_of,
)
from flux_lab.training.loop import train
from flux_lab.transformer import FluxTransformer2DModel

STRONGEST = 6.0


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
    """The student learns the pictures' velocity, moved by the teacher's guidance where w > 1."""

    def forward(
        self, latents: Tensor, noise: Tensor, t: Tensor, clip_ids: Tensor, t5_ids: Tensor, no_clip: Tensor, no_t5: Tensor, guidance: Tensor
    ) -> dict[str, Tensor]:
        x_t = torch.lerp(latents, noise, t[:, None, None, None])
        text, without = self.texts(clip_ids, t5_ids, no_clip, no_t5)
        target = pack_latents(noise - latents)
        distilled = guidance > 1
        some = (pack_latents(x_t)[distilled], t[distilled], *([each[distilled] for each in texts] for texts in (text, without)))
        conditional, unconditional = two_passes(self.teacher, *some, image_ids(x_t))
        target[distilled] += (guidance[distilled, None, None] - 1) * (conditional - unconditional)
        error = (predict_velocity(self.transformer, x_t, t, text, guidance) - target).square().mean(dim=(1, 2))
        return {"loss": error.mean(), "flow_loss": error[~distilled].mean(), "guided_loss": error[distilled].mean()}


@torch.no_grad()
def two_passes(
    model: FluxTransformer2DModel,
    x_t: Float[Tensor, "batch tokens channels"],
    t: Tensor,
    text: Sequence,
    without: Sequence,
    img_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """The velocities of a model that was not distilled, with the text and with the empty one: one batch of two."""
    both = tuple(torch.cat(pair) for pair in zip(text, without, strict=True))
    twice = [torch.cat([value] * 2) for value in (x_t, t)]
    conditional, unconditional = predict_packed_velocity(model, *twice, both, img_ids, torch.ones_like(twice[1])).chunk(2)
    return conditional, unconditional


class GuidanceBatches(FlowBatches):
    """Batches of the flow, with the empty caption beside every caption and a guidance strength. Every fourth has strength 1."""

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = super().__call__(step, generator)
        count = self.batch_size
        guidance = 1 + (STRONGEST - 1) * torch.rand(count, generator=generator)
        guidance[torch.arange(count) % 4 == 0] = 1.0
        return batch | {"no_clip": self.no_clip.repeat(count, 1), "no_t5": self.no_t5.repeat(count, 1), "guidance": guidance}


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
    parser.add_argument("--out", type=Path, default=Path("runs/guided"))
    parser.add_argument("--initial", type=Path, default=Path("runs/flow/transformer"))
    parser.add_argument("--teacher", type=Path, help="default: the transformer of --initial")
    parser.add_argument("--rate", type=float, default=5e-4)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    student, teacher = (load_transformer(folder) for folder in (options.initial, options.teacher or options.initial))
    train_student(GuidanceLoss, GuidanceBatches, student, teacher, options)


if __name__ == "__main__":
    main()
