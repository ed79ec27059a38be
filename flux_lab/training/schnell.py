"""Stage 6c: step distillation, for schnell.

    python -m flux_lab.training.schnell --initial runs/deepened/transformer --teacher runs/flow/transformer --out runs/schnell

FLUX.1-schnell draws in four steps and has no guidance embedding. The student begins as a transformer that was distilled for guidance,
which is folded into a bias, and learns to do in one Euler step what the teacher does in several with true classifier-free guidance
(progressive distillation: Salimans & Ho 2022, arXiv 2202.00512). It starts every step from where its own steps before have brought it, so
it learns to correct its own errors (Ross et al. 2011, arXiv 1011.0686). Writes `transformer/` (a diffusers folder).
"""

import argparse
import copy
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from flux_lab.checkpoints import load_transformer
from flux_lab.config import FLUX_SCHNELL_SCHEDULER
from flux_lab.embeddings import get_timestep_embedding
from flux_lab.latents import pack_latents
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler, default_sigmas
from flux_lab.training.flow import Encoders, add_options, image_ids, predict_packed_velocity
from flux_lab.training.guidance import GuidanceBatches, TaughtLoss, guided_velocity, train_student
from flux_lab.transformer import FluxTransformer2DModel

STEPS = 4
GUIDANCE = 3.5
SUBSTEPS = 4  # of the teacher, for one of the student's


@torch.no_grad()
def without_guidance(guided: FluxTransformer2DModel, guidance: float) -> FluxTransformer2DModel:
    """The same function at one guidance scale, without guidance embedding: what that adds becomes part of the time embedding's bias."""
    student = FluxTransformer2DModel(dataclasses.replace(guided.config, guidance_embeds=False))
    weights = {name: tensor for name, tensor in copy.deepcopy(guided.state_dict()).items() if "guidance_embedder" not in name}
    strength = guided.time_text_embed.guidance_embedder(get_timestep_embedding(torch.tensor([1000 * guidance])))
    weights["time_text_embed.timestep_embedder.linear_2.bias"] += strength[0]
    student.load_state_dict(weights)
    return student


def schnell_sigmas() -> Float[Tensor, "levels"]:
    """1, 0.75, 0.5, 0.25, 0: the levels at which schnell stops."""
    scheduler = FlowMatchEulerDiscreteScheduler(FLUX_SCHNELL_SCHEDULER)
    scheduler.set_timesteps(sigmas=default_sigmas(STEPS))
    return scheduler.sigmas


class StepLoss(TaughtLoss):
    """The student's velocity at one of its four levels against the way that the teacher goes from there to the next."""

    def __init__(self, transformer: FluxTransformer2DModel, teacher: FluxTransformer2DModel, encoders: Encoders):
        super().__init__(transformer, teacher, encoders)
        self.sigmas = schnell_sigmas().tolist()

    def forward(
        self,
        noise: Float[Tensor, "batch channels height width"],
        level: Int[Tensor, "batch"],
        clip_ids: Tensor,
        t5_ids: Tensor,
        no_clip: Tensor,
        no_t5: Tensor,
    ) -> dict[str, Tensor]:
        (text, without), img_ids = self.texts(clip_ids, t5_ids, no_clip, no_t5), image_ids(noise)
        start = self.reached(pack_latents(noise), level, text, img_ids)
        here = torch.tensor(self.sigmas, device=noise.device)[level]
        there = torch.tensor(self.sigmas, device=noise.device)[level + 1]
        end = self.taught(start, here, there, text, without, img_ids)
        target = (end - start) / (there - here)[:, None, None]
        return {"loss": F.mse_loss(velocity(self.transformer, start, here, text, img_ids), target)}

    @torch.no_grad()
    def reached(self, x: Tensor, level: Tensor, text: tuple, img_ids: Tensor) -> Tensor:
        """Where the student's own steps bring the noise: `level` of them."""
        x = x.clone()
        for index in range(int(level.max())):
            goes = level > index
            some = tuple(each[goes] for each in text)
            sigma = torch.full_like(x[goes, 0, 0], self.sigmas[index])
            change = self.sigmas[index + 1] - self.sigmas[index]
            x[goes] += change * velocity(self.transformer, x[goes], sigma, some, img_ids)
        return x

    @torch.no_grad()
    def taught(self, x: Tensor, here: Tensor, there: Tensor, text: tuple, without: tuple, img_ids: Tensor) -> Tensor:
        """Where `SUBSTEPS` Euler steps of the teacher, with true guidance, lead from `here` to `there`."""
        change = (there - here) / SUBSTEPS
        for index in range(SUBSTEPS):
            taught = guided_velocity(self.teacher, x, here + index * change, text, without, img_ids, GUIDANCE)
            x = x + change[:, None, None] * taught
        return x


def velocity(model: FluxTransformer2DModel, x: Tensor, sigma: Tensor, text: tuple, img_ids: Tensor) -> Tensor:
    """One call on packed latents; a model that takes a guidance scale is given the usual one."""
    return predict_packed_velocity(model, x, sigma, text, img_ids, torch.full_like(sigma, GUIDANCE))


class StepBatches(GuidanceBatches):
    """Noise, captions, and at which of its four levels the student is to learn. Pictures are not needed: the teacher has seen them."""

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = super().__call__(step, generator)
        level = torch.randint(STEPS, (self.batch_size,), generator=generator)
        return {name: batch[name] for name in ("noise", "clip_ids", "t5_ids", "no_clip", "no_t5")} | {"level": level}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/schnell"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/flow/transformer"), help="the rectified flow, not distilled")
    parser.add_argument("--initial", type=Path, default=Path("runs/deepened/transformer"), help="what the student begins as")
    parser.add_argument("--rate", type=float, default=5e-4)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    initial, teacher = (load_transformer(folder) for folder in (options.initial, options.teacher))
    if not initial.config.guidance_embeds:
        parser.error(f"--initial {options.initial}: expected a transformer with a guidance embedding")
    train_student(StepLoss, StepBatches, without_guidance(initial.float(), GUIDANCE), teacher, options)


if __name__ == "__main__":
    main()
