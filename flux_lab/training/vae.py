"""Stage 3: the autoencoder, and the latents of all scenes.

    python -m flux_lab.training.vae --scenes runs/scenes --out runs/vae --steps 6000
    python -m flux_lab.training.vae --scenes runs/scenes --out runs/sd15_vae --steps 6000 --generation sd15

Loss: L1 + 2 MSE + 2e-5 KL. Crops of 64 pixels for the first three quarters, then whole pictures. Afterwards the latents' mean and
standard deviation are measured: they become shift_factor and scaling_factor, so that the transformer sees mean 0 and deviation 1.
SD 1.5 has no shift, only the factor: its 0.18215 is one over the standard deviation of its latents.
Writes `vae/` (a diffusers folder) and `latents.safetensors` (posterior means of the scenes, scaled, float16 [scenes, channels, 16, 16]
with 16 channels, or SD 1.5's 4).
"""

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from flux_lab import shapes
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import save_model
from flux_lab.config import MINI_VAE, AutoencoderKLConfig
from flux_lab.files import replacing
from flux_lab.sd15.config import MINI_SD_VAE
from flux_lab.training.loop import Settings, is_main_process, load_trained, train
from flux_lab.training.scenes import read_images

CROP = 64
CROPS_UNTIL = 0.75
KL_WEIGHT = 2e-5
FIRST_LOGVAR = -6.0
GENERATIONS = {"flux": MINI_VAE, "sd15": MINI_SD_VAE}


class VAELoss(nn.Module):
    """The autoencoder with its training loss."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.vae = AutoencoderKL(config)
        # Start with little noise in the latents: otherwise it hides the picture, and training takes much longer to begin.
        last = self.vae.quant_conv or self.vae.encoder.conv_out
        nn.init.constant_(last.bias[config.latent_channels :], FIRST_LOGVAR)
        self.to(memory_format=torch.channels_last)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], noise: Float[Tensor, "batch channels rows columns"]
    ) -> dict[str, Tensor]:
        posterior = self.vae.encode(images.contiguous(memory_format=torch.channels_last))
        decoded = self.vae.decode(posterior.mean + posterior.std * noise)
        absolute, square = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        kl = posterior.kl().mean() / images[0, 0].numel()
        # Pixels span 2, so the peak of the signal-to-noise ratio is 4 / MSE.
        return {"loss": absolute + 2 * square + KL_WEIGHT * kl, "psnr": 10 * torch.log10(4 / square), "kl": kl}


class Pictures:
    """Batches of random crops, later of whole pictures with as many pixels."""

    def __init__(self, images: np.ndarray, settings: Settings, config: AutoencoderKLConfig):
        self.images, self.settings, self.config = images, settings, config

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.images.shape[1]
        crop = CROP if step < CROPS_UNTIL * self.settings.steps else size
        count = max(1, self.settings.batch_size * CROP**2 // crop**2)
        which = torch.randint(len(self.images), (count,), generator=generator).tolist()
        corners = torch.randint(size - crop + 1, (count, 2), generator=generator).tolist()
        crops = [self.images[i, top : top + crop, left : left + crop] for i, (top, left) in zip(which, corners, strict=True)]
        side = crop // self.config.vae_scale_factor
        noise = torch.randn(count, self.config.latent_channels, side, side, generator=generator)
        return {"images": to_tensor(np.stack(crops)), "noise": noise}


def to_tensor(images: np.ndarray) -> Float[Tensor, "batch 3 height width"]:
    """uint8 pictures to [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(images)), "batch height width channels -> batch channels height width").float() / 127.5 - 1


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray, batch: int = 32) -> Float[Tensor, "scenes channels rows columns"]:
    """The posterior means of all pictures, unscaled, float16. Processes started together take a share each, and all get the whole."""
    device, processes = next(vae.parameters()).device, PartialState()
    share = math.ceil(len(images) / processes.num_processes)
    # Equal shares, for they are gathered: the last process may see the last picture more than once.
    mine = [min(processes.process_index * share + i, len(images) - 1) for i in range(share)]
    with shapes.checks(enabled=False):
        means = [
            vae.encode(to_tensor(images[mine[i : i + batch]]).to(device)).mode().half()
            for i in tqdm(range(0, share, batch), mininterval=5, disable=not is_main_process())
        ]
    return gather(torch.cat(means).contiguous())[: len(images)].cpu()


def measured_scaling(config: AutoencoderKLConfig, latents: Tensor) -> AutoencoderKLConfig:
    """The configuration with the factor that gives these latents standard deviation 1, and, where it has a shift, the one for mean 0."""
    values = latents.float()
    shift_factor = None if config.shift_factor is None else round(values.mean().item(), 4)
    return dataclasses.replace(config, shift_factor=shift_factor, scaling_factor=round(1 / values.std().item(), 4))


def export(out: Path, config: AutoencoderKLConfig, images: np.ndarray) -> AutoencoderKLConfig:
    """Write the trained autoencoder with its measured scaling, and the scaled latents of `images`."""
    vae = AutoencoderKL(config).eval().to(memory_format=torch.channels_last)
    vae.load_state_dict(load_trained(out, "vae"))
    latents = encode_all(vae.to("cuda" if torch.cuda.is_available() else "cpu"), images)
    vae.config = measured_scaling(config, latents)
    if not is_main_process():
        return vae.config
    save_model(vae.cpu(), out / "vae")
    scaled = (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    with replacing(out / "latents.safetensors") as file:
        save_file({"latents": scaled.half().contiguous()}, file)
    return vae.config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--out", type=Path, help="default: runs/vae, or runs/sd15_vae")
    parser.add_argument("--generation", choices=GENERATIONS, default="flux", help="whose latents: FLUX's 16 channels, or SD 1.5's 4")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16, help="crops a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--encode", type=int, help="how many scenes to encode afterwards (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = GENERATIONS[options.generation]
    out = options.out or Path("runs/vae" if options.generation == "flux" else "runs/sd15_vae")
    images = read_images(options.scenes)
    settings = Settings(steps=options.steps, batch_size=options.batch, learning_rate=options.rate, ema=0.998, seed=options.seed)
    torch.manual_seed(options.seed)
    train(VAELoss(config), Pictures(images, settings, config), out, settings)
    config = export(out, config, images[: options.encode])
    print(f"shift_factor {config.shift_factor}, scaling_factor {config.scaling_factor}")


if __name__ == "__main__":
    main()
