"""A checkpoint's parts with random numbers, as the training stages leave them, for the tests of what comes after training."""

import dataclasses
from pathlib import Path

import numpy as np
from conftest import randomize_

from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import save_model
from flux_lab.clip import CLIPTextModel
from flux_lab.config import TINY, TINY_CLIP, TINY_T5, TINY_VAE
from flux_lab.t5 import T5EncoderModel
from flux_lab.training.captions import captions
from flux_lab.training.tokenizers import EVERYDAY, write_tokenizers
from flux_lab.training.world import sample_scene
from flux_lab.transformer import FluxTransformer2DModel

VAE = dataclasses.replace(TINY_VAE, sample_size=128, scaling_factor=0.7, shift_factor=0.2)
CLIP = dataclasses.replace(TINY_CLIP, max_position_embeddings=77)


def write_parts(folder: Path) -> dict[str, Path]:
    """Write all parts; returns where each is, under the names of `export`'s arguments."""
    models = {
        "transformer": FluxTransformer2DModel(TINY),
        "vae": AutoencoderKL(VAE),
        "clip": CLIPTextModel(CLIP),
        "t5": T5EncoderModel(TINY_T5),
    }
    for seed, (name, model) in enumerate(models.items()):
        save_model(randomize_(model, seed), folder / name)
    (folder / "tokenizers").mkdir()
    rng = np.random.default_rng(0)
    texts = [caption.text for _ in range(30) for caption in captions(sample_scene(rng), rng, 3)]
    write_tokenizers(folder / "tokenizers", texts + EVERYDAY.split(), clip_size=CLIP.vocab_size, t5_size=400)
    return {name: folder / name for name in (*models, "tokenizers")}
