"""The SD 1.5 example: its small UNet learns to predict the noise in the scenes' latents.

    python -m flux_lab.training.vae --generation sd15 --scenes runs/scenes --out runs/sd15_vae
    python -m flux_lab.training.unet --out runs/unet --steps 8000

x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise with SD 1.5's schedule and t uniform in 0 ... 999; the target is the noise (Ho et al. 2020,
equation 14). The caption comes as the hidden states of the same frozen CLIP as FLUX's; one in ten is replaced by the empty one, for
classifier-free guidance. Writes `unet/` (a diffusers folder).
"""

import argparse
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_lab.checkpoints import load_clip
from flux_lab.clip import CLIPTextModel
from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.sd15.checkpoints import load_unet, save_unet
from flux_lab.sd15.config import MINI_UNET, SD15_DDPM
from flux_lab.sd15.noise_schedule import NoiseSchedule
from flux_lab.sd15.resnet import ResnetBlock2D
from flux_lab.sd15.transformer_2d import Transformer2DModel
from flux_lab.sd15.unet import UNet2DConditionModel
from flux_lab.training.loop import Settings, is_main_process, load_trained, train
from flux_lab.training.texts import caption_ids

DROP_TEXT = 0.1


class NoiseLoss(nn.Module):
    """The UNet with its training loss."""

    def __init__(self, unet: UNet2DConditionModel, clip: CLIPTextModel, schedule: NoiseSchedule):
        super().__init__()
        self.unet, self.schedule = unet, schedule
        self.clip = clip.eval().requires_grad_(False)

    def forward(
        self,
        latents: Float[Tensor, "batch channels rows columns"],
        noise: Float[Tensor, "batch channels rows columns"],
        timesteps: Int[Tensor, "batch"],
        clip_ids: Int[Tensor, "batch length"],
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            text = self.clip(clip_ids).last_hidden_state
        x_t = self.schedule.add_noise(latents, noise, timesteps)
        return {"loss": F.mse_loss(self.unet(x_t, timesteps, text), noise)}


class NoiseBatches:
    """Latents, noise, timesteps and captions, each drawn anew for every step."""

    def __init__(self, scenes: Path, tokenizers: Path, latents: Path, schedule: NoiseSchedule, batch_size: int):
        self.latents = load_file(latents)["latents"]
        self.clip_ids = caption_ids(scenes, tokenizers).clip
        self.no_clip = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer")("")
        self.schedule, self.batch_size = schedule, batch_size

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = self.batch_size
        which = torch.randint(len(self.latents), (count,), generator=generator)
        caption = torch.randint(self.clip_ids.shape[1], (count,), generator=generator)
        kept = torch.rand(count, 1, generator=generator) >= DROP_TEXT
        latents = self.latents[which].float()
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator),
            "clip_ids": torch.where(kept, self.clip_ids[which, caption].long(), self.no_clip),
        }


def initialize(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Zeros where a branch joins its residual, and in the output: every residual branch starts silent, as in SD 1.5's own code.

    Source: Dhariwal & Nichol 2021, arXiv 2105.05233, whose implementation calls this `zero_module`.
    """
    last = [module.conv2 for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    last += [module.proj_out for module in unet.modules() if isinstance(module, Transformer2DModel)]
    for layer in [*last, unet.conv_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return unet


def export(out: Path, unet: UNet2DConditionModel) -> None:
    """Write the trained (averaged) UNet of a run to `out/unet`."""
    if not is_main_process():
        return
    exported = UNet2DConditionModel(unet.config)
    exported.load_state_dict(load_trained(out, "unet"))
    save_unet(exported, out / "unet")


def make_unet(clip: CLIPTextModel, latents: Tensor) -> UNet2DConditionModel:
    """A new UNet for this text encoder and these latents."""
    channels, size = latents.shape[1:3]
    config = dataclasses.replace(
        MINI_UNET, in_channels=channels, out_channels=channels, sample_size=size, cross_attention_dim=clip.config.hidden_size
    )
    return initialize(UNet2DConditionModel(config))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--tokenizers", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--latents", type=Path, default=Path("runs/sd15_vae/latents.safetensors"))
    parser.add_argument("--clip", type=Path, default=Path("runs/clip/text_encoder"))
    parser.add_argument("--out", type=Path, default=Path("runs/unet"))
    parser.add_argument("--initial", type=Path, help="a unet folder to start from, in place of random weights")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps over which the rate falls to zero")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    schedule, clip = NoiseSchedule(SD15_DDPM), load_clip(options.clip, torch.float32)
    batches = NoiseBatches(options.scenes, options.tokenizers, options.latents, schedule, options.batch)
    unet = load_unet(options.initial, torch.float32) if options.initial else make_unet(clip, batches.latents)
    unet.requires_grad_(True)
    settings = Settings(
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=options.rate,
        decay=options.decay,
        weight_decay=0.01,
        ema=options.ema,
        seed=options.seed,
    )
    train(NoiseLoss(unet, clip, schedule), batches, options.out, settings)
    export(options.out, unet)


if __name__ == "__main__":
    main()
