"""Checkpoints of SD 1.5: the UNet, and the layout of diffusers' StableDiffusionPipeline. All else is read as FLUX's is."""

from pathlib import Path

import torch
from torch import nn

from flux_lab.checkpoints import AUTOENCODER, CLIP, Component, PipelineLayout, load_component, save_model, write_pipeline
from flux_lab.checkpoints import load_scheduler as load_scheduler_of
from flux_lab.sd15.config import UNet2DConditionConfig
from flux_lab.sd15.ddpm import DDPMScheduler
from flux_lab.sd15.pndm import PNDMScheduler
from flux_lab.sd15.unet import UNet2DConditionModel

UNET = Component(model=UNet2DConditionModel, config=UNet2DConditionConfig, folder="unet", weights="diffusion_pytorch_model")
SCHEDULERS = (PNDMScheduler, DDPMScheduler)
Scheduler = PNDMScheduler | DDPMScheduler
LAYOUT = PipelineLayout(
    name="StableDiffusionPipeline",
    parts={
        "scheduler": ("diffusers", *(kind.__name__ for kind in SCHEDULERS)),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer", "CLIPTokenizerFast"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    },
    components={component.folder: component for component in (UNET, AUTOENCODER, CLIP)},
    # A classifier of finished pictures, no part of how they are made.
    unused={"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False},
)


def load_unet(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> UNet2DConditionModel:
    """Load a UNet from a diffusers folder, a pipeline's folder, or a hub id. `dtype=None` keeps the file's. Raises CheckpointError."""
    return load_component(UNET, path, dtype, device)


def save_unet(unet: UNet2DConditionModel, folder: str | Path) -> None:
    """Write a UNet in the diffusers layout: `config.json` and one safetensors file."""
    save_model(unet, folder, LAYOUT.components)


def load_scheduler(path: str | Path) -> Scheduler:
    """Read a PNDM or DDPM `scheduler_config.json` from its folder, a pipeline's, or a hub id. Raises CheckpointError for another kind."""
    return load_scheduler_of(path, SCHEDULERS)


def write_sd15(folder: str | Path, *, models: dict[str, nn.Module], scheduler: Scheduler, tokenizer: str | Path) -> None:
    """Write a pipeline that diffusers' StableDiffusionPipeline reads.

    `models`: unet, vae and text_encoder; `tokenizer`: the folder to copy.
    """
    write_pipeline(folder, models=models, scheduler=scheduler, tokenizers={"tokenizer": tokenizer}, layout=LAYOUT)
