"""Which models a pipeline has and how large they are: FLUX.1-dev, schnell, the miniature, or any folder."""

import dataclasses
import json
from pathlib import Path

from flux_lab import config as presets
from flux_lab.config import AutoencoderKLConfig, CLIPTextConfig, FluxTransformer2DConfig, T5Config


@dataclasses.dataclass(frozen=True)
class Parts:
    """The configurations of a pipeline's models, and how many T5 tokens a prompt has."""

    name: str
    transformer: FluxTransformer2DConfig
    vae: AutoencoderKLConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: T5Config
    length: int

    @classmethod
    def from_folder(cls, folder: Path, length: int) -> "Parts":
        """Those of a pipeline in the diffusers layout."""
        kinds = {field.name: field.type for field in dataclasses.fields(cls) if field.name not in ("name", "length")}
        read = {name: json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in kinds}
        return cls(folder.name, **{name: kind.from_dict(read[name]) for name, kind in kinds.items()}, length=length)


_PUBLISHED = (presets.FLUX_VAE, presets.FLUX_CLIP, presets.FLUX_T5)
MODELS = {
    "dev": Parts("FLUX.1-dev", presets.FLUX_DEV, *_PUBLISHED, length=512),
    "schnell": Parts("FLUX.1-schnell", presets.FLUX_SCHNELL, *_PUBLISHED, length=256),
    "mini": Parts("miniature", presets.FLUX_MINI, presets.MINI_VAE, presets.MINI_CLIP, presets.MINI_T5, length=32),
}
