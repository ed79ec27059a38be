"""The sizes of a whole pipeline: the configurations of its parts, and the shape of every tensor that goes from one part to the next."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_lab import config
from flux_lab.latents import PATCH
from flux_lab.prompt import MAX_SEQUENCE_LENGTH

if TYPE_CHECKING:
    from flux_lab.pipeline import FluxPipeline

RGB = 3
POSITION_AXES = 3


@dataclass(frozen=True)
class Anatomy:
    """A pipeline without its weights. Parts have the names of their folders in a checkpoint; `length` counts T5 tokens."""

    name: str
    transformer: config.FluxTransformer2DConfig
    vae: config.AutoencoderKLConfig
    text_encoder: config.CLIPTextConfig
    text_encoder_2: config.T5Config
    scheduler: config.FlowMatchEulerDiscreteSchedulerConfig
    length: int

    @property
    def tokens(self) -> int:
        """Image tokens of a picture of the checkpoint's own size."""
        return (self.vae.sample_size // (self.vae.vae_scale_factor * PATCH)) ** 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, for one prompt and one picture, in the order in which they are made."""
        network, pixels = self.transformer, self.vae.sample_size
        side, channels, dim = pixels // self.vae.vae_scale_factor, self.vae.latent_channels, network.inner_dim
        tokens = (1, self.tokens, network.in_channels)
        return {
            "clip_ids": (1, self.text_encoder.max_position_embeddings),
            "t5_ids": (1, self.length),
            "pooled_prompt_embeds": (1, network.pooled_projection_dim),
            "prompt_embeds": (1, self.length, network.joint_attention_dim),
            "latents": (1, channels, side, side),
            "tokens": tokens,
            "position_ids": (self.length + self.tokens, POSITION_AXES),
            "timestep": (1,),
            "guidance": (1,),
            "temb": (1, dim),
            "text_stream": (1, self.length, dim),
            "image_stream": (1, self.tokens, dim),
            "sequence": (1, self.length + self.tokens, dim),
            "velocity": tokens,
            "image": (1, RGB, pixels, pixels),
        }


MINIATURE = Anatomy(
    name="miniature",
    transformer=config.FLUX_MINI,
    vae=config.MINI_VAE,
    text_encoder=config.MINI_CLIP,
    text_encoder_2=config.MINI_T5,
    scheduler=config.FLUX_DEV_SCHEDULER,
    length=32,
)
FLUX_1_DEV = Anatomy(
    name="FLUX.1-dev",
    transformer=config.FLUX_DEV,
    vae=config.FLUX_VAE,
    text_encoder=config.FLUX_CLIP,
    text_encoder_2=config.FLUX_T5,
    scheduler=config.FLUX_DEV_SCHEDULER,
    length=MAX_SEQUENCE_LENGTH,
)


def anatomy_of(pipe: "FluxPipeline", name: str = MINIATURE.name) -> Anatomy:
    """The sizes of a loaded pipeline, read off its parts."""
    return Anatomy(
        name=name,
        transformer=pipe.transformer.config,
        vae=pipe.vae.config,
        text_encoder=pipe.text_encoder.config,
        text_encoder_2=pipe.text_encoder_2.config,
        scheduler=pipe.scheduler.config,
        length=pipe.tokenizer_2.model_max_length,
    )
