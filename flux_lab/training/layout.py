"""A second question for the transformer while it learns the flow: what stands where?

A picture's velocity says little about shapes: a cube and a cylinder differ at a few edges. So the image stream after the double-stream
blocks is asked, by one linear layer that is thrown away afterwards, which kinds of things cover each of its patches. The renderer knows
the answer. What a block must know to answer it, the blocks behind it can draw. (Yu et al. 2024, arXiv 2410.06940, ask for the features
of a pretrained encoder at this place, and find that the flow is learned many times faster.)
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from flux_lab.files import replacing
from flux_lab.training.raytrace import OVERSAMPLING, camera_rays
from flux_lab.training.scenes import read_scenes
from flux_lab.training.solids import meet
from flux_lab.training.world import COLORS, EYE, MATERIALS, SHAPES, SIZES, Scene
from flux_lab.transformer import FluxTransformer2DModel

KINDS = (*SHAPES, *COLORS, *MATERIALS, *SIZES)
PATCHES = 8  # a side: 128 pixels, latents of 16, patches of 2
RAYS = 4  # a side of a patch


def layout(scene: Scene) -> UInt8[np.ndarray, "tokens kinds"]:
    """How many of a patch's 16 rays meet a thing of each kind first; patches row by row, as latents are packed."""
    direction = camera_rays(PATCHES * RAYS // OVERSAMPLING).direction.reshape(3, -1)
    eye = np.array(EYE, np.float32)[:, None]
    distances = np.stack([meet(item, eye, direction) for item in scene.objects])
    first, seen = distances.argmin(axis=0), np.isfinite(distances.min(axis=0))
    counts = np.zeros((PATCHES * PATCHES, len(KINDS)), np.uint8)
    for index, item in enumerate(scene.objects):
        rays = (seen & (first == index)).reshape(PATCHES, RAYS, PATCHES, RAYS).sum(axis=(1, 3)).reshape(-1, 1)
        kinds = [KINDS.index(kind) for kind in (item.shape, item.color, item.material, item.size)]
        counts[:, kinds] += rays.astype(np.uint8)
    return counts


def scene_layouts(scenes: Path) -> UInt8[Tensor, "scenes tokens kinds"]:
    """The layouts of a folder of scenes, read from `layouts.npy` in it, which is written where it is missing."""
    path = scenes / "layouts.npy"
    if not path.exists():
        found = np.stack([layout(scene) for scene in tqdm(read_scenes(scenes), desc="layouts", mininterval=5)])
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, found)
    return torch.from_numpy(np.load(path))


class LayoutHead(nn.Module):
    """One linear layer that reads the image stream as the transformer's last double-stream block left it."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.linear = nn.Linear(width, len(KINDS))
        transformer.transformer_blocks[-1].register_forward_hook(self.read)

    def read(self, block: nn.Module, inputs: tuple, streams: tuple[Tensor, Tensor]) -> None:
        _, self.image_stream = streams

    def loss(self, counts: UInt8[Tensor, "batch tokens kinds"]) -> Float[Tensor, ""]:
        """Binary cross entropy against the share of each patch that is covered."""
        answers = self.linear(F.layer_norm(self.image_stream, self.image_stream.shape[-1:]))
        return F.binary_cross_entropy_with_logits(answers, counts.to(answers.dtype) / RAYS**2)
