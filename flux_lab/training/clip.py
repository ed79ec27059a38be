"""Stage 4b: CLIP's text encoder, contrastive.

    python -m flux_lab.training.clip --scenes runs/scenes --tokenizers runs/tokenizers --out runs/clip --steps 1500

A caption's pooled vector is to be closer to its own scene's picture than to all others of the batch (Radford et al. 2021, section
2.3). The image tower is small and thrown away afterwards. Writes `text_encoder/` (a transformers folder).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from flux_lab.checkpoints import save_model
from flux_lab.clip import CLIPTextModel
from flux_lab.config import MINI_CLIP, CLIPTextConfig
from flux_lab.training.loop import Settings, is_main_process, load_trained, train
from flux_lab.training.options import text_stage_options
from flux_lab.training.scenes import read_images
from flux_lab.training.texts import CaptionIds, caption_ids
from flux_lab.training.vae import to_tensor

SHRINK = 2


class Contrast(nn.Module):
    """The text encoder that we keep, a projection, and a small convolutional image tower."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.text = CLIPTextModel(config)
        self.project = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.picture = image_tower(config.hidden_size)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, ids: Int[Tensor, "batch length"], images: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        texts = F.normalize(self.project(self.text(ids).pooler_output), dim=-1)
        pictures = F.normalize(self.picture(images), dim=-1)
        logits = self.log_scale.exp().clamp(max=100) * texts @ pictures.T
        own = torch.arange(len(ids), device=ids.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"loss": loss, "matched": (logits.argmax(1) == own).float().mean()}


def image_tower(out_dim: int) -> nn.Sequential:
    """64-pixel picture to one vector: strided convolutions, the last map kept flat so that left and right are not lost."""
    layers: list[nn.Module] = []
    for wide_in, wide_out in ((3, 24), (24, 48), (48, 64), (64, 64)):
        layers += [nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1), nn.GroupNorm(8, wide_out), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(128), nn.SiLU(), nn.Linear(128, out_dim))


class Pairs:
    """Batches of captions and pictures, at half the size. Captions are cut to the longest: the mask is causal, padding comes last."""

    def __init__(self, images: np.ndarray, ids: CaptionIds, settings: Settings):
        self.images, self.settings = images, settings
        padding = ids.clip[0, 0, -1]
        longest = int((ids.clip != padding).sum(-1).max()) + 1
        self.ids = ids.clip[:, :, :longest]

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        count, captions = self.settings.batch_size, self.ids.shape[1]
        which = torch.randint(len(self.ids), (count,), generator=generator)
        caption = torch.randint(captions, (count,), generator=generator)
        images = to_tensor(np.stack([self.images[i] for i in which.tolist()]))
        return {"ids": self.ids[which, caption].long(), "images": F.avg_pool2d(images, SHRINK)}


def main(arguments: list[str] | None = None) -> None:
    options, settings = text_stage_options(__doc__, arguments, out=Path("runs/clip"), steps=1500)
    ids = caption_ids(options.scenes, options.tokenizers)
    config = dataclasses.replace(MINI_CLIP, vocab_size=len(json.loads((options.tokenizers / "tokenizer" / "vocab.json").read_text())))
    torch.manual_seed(options.seed)
    task = Contrast(config)
    pairs = Pairs(read_images(options.scenes), ids, settings)
    task(**pairs(0, torch.Generator().manual_seed(0)))  # the lazy layer takes its size from a first batch
    train(task, pairs, options.out, settings)
    encoder = CLIPTextModel(config)
    encoder.load_state_dict(load_trained(options.out, "text"))
    if is_main_process():
        save_model(encoder, options.out / "text_encoder")


if __name__ == "__main__":
    main()
