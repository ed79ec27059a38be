"""Stage 6b: the grown transformer learns to say what the shallow one says.

    python -m flux_lab.training.deepen --initial runs/grown/transformer --teacher runs/flow/transformer --out runs/deepened

`grow` leaves the deep transformer near the shallow one's function, but not at it. The target here is the shallow one's own velocity,
with true classifier-free guidance at every strength, so guidance is distilled on the way. It has none of the randomness of noise - x0,
which a picture's velocity has, so few steps and small batches bring the two together (Hinton et al. 2015, arXiv 1503.02531). Writes
`transformer/` (a diffusers folder).
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_lab.checkpoints import load_transformer
from flux_lab.latents import pack_latents
from flux_lab.training.flow import add_options, image_ids, predict_velocity
from flux_lab.training.guidance import GuidanceBatches, TaughtLoss, train_student, two_passes


class DepthLoss(TaughtLoss):
    """The student's velocity against the teacher's guided one, for the same picture and text. `off`: relative to its norm."""

    def forward(
        self, latents: Tensor, noise: Tensor, t: Tensor, clip_ids: Tensor, t5_ids: Tensor, no_clip: Tensor, no_t5: Tensor, guidance: Tensor
    ) -> dict[str, Tensor]:
        x_t = torch.lerp(latents, noise, t[:, None, None, None])
        text, without = self.texts(clip_ids, t5_ids, no_clip, no_t5)
        conditional, unconditional = two_passes(self.teacher, pack_latents(x_t), t, text, without, image_ids(x_t))
        target = torch.lerp(unconditional, conditional, guidance[:, None, None])
        loss = F.mse_loss(predict_velocity(self.transformer, x_t, t, text, guidance), target)
        return {"loss": loss, "off": (loss / target.square().mean()).sqrt()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/deepened"))
    parser.add_argument("--initial", type=Path, default=Path("runs/grown/transformer"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/flow/transformer"))
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    student, teacher = (load_transformer(folder) for folder in (options.initial, options.teacher))
    train_student(DepthLoss, GuidanceBatches, student, teacher, options)


if __name__ == "__main__":
    main()
