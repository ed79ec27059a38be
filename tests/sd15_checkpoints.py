"""A small SD 1.5 checkpoint with random numbers, whole or in parts."""

import dataclasses
from pathlib import Path

from conftest import randomize_

from flux_lab import data_dir
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import save_model
from flux_lab.clip import CLIPTextModel
from flux_lab.config import TINY_CLIP, TINY_VAE
from flux_lab.sd15.checkpoints import save_unet, write_sd15
from flux_lab.sd15.config import SD15_DDPM, SD15_PNDM, TINY_UNET
from flux_lab.sd15.ddpm import DDPMScheduler
from flux_lab.sd15.pndm import PNDMScheduler
from flux_lab.sd15.unet import UNet2DConditionModel

CLIP = dataclasses.replace(TINY_CLIP, vocab_size=1000, max_position_embeddings=77)
UNET = dataclasses.replace(TINY_UNET, cross_attention_dim=CLIP.hidden_size, sample_size=8)
VAE = dataclasses.replace(
    TINY_VAE, latent_channels=4, scaling_factor=0.18215, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True
)
SCHEDULERS = {"pndm": PNDMScheduler(SD15_PNDM), "ddpm": DDPMScheduler(SD15_DDPM)}
TOKENIZER = data_dir() / "flux-mini" / "tokenizer"


def make_models():
    models = {"unet": UNet2DConditionModel(UNET), "vae": AutoencoderKL(VAE), "text_encoder": CLIPTextModel(CLIP)}
    return {name: randomize_(model, seed) for seed, (name, model) in enumerate(models.items())}


def write_checkpoint(folder: Path, scheduler: str = "pndm") -> Path:
    write_sd15(folder, models=make_models(), scheduler=SCHEDULERS[scheduler], tokenizer=TOKENIZER)
    return folder


def write_parts(folder: Path) -> dict[str, Path]:
    """The parts as training leaves them, under the names of the arguments of `export_sd15.export`."""
    models = make_models()
    save_unet(models["unet"], folder / "unet")
    save_model(models["vae"], folder / "vae")
    save_model(models["text_encoder"], folder / "clip")
    return {name: folder / name for name in ("unet", "vae", "clip")} | {"tokenizer": TOKENIZER}
