"""SD 1.5 from prompt to image, in the same numbered steps as FLUX's `pipeline.py`.

Guidance costs two predictions a step, with the prompt and with the negative one, which run as one batch. The text comes as CLIP's
hidden states, one vector a token; the pooled vector is not used. Source: diffusers
`pipelines/stable_diffusion/pipeline_stable_diffusion.py`; Ho & Salimans 2022, arXiv 2207.12598, for the guidance.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flux_lab import data_dir
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import check_device, load_autoencoder, load_clip, local_folder, read_model_index
from flux_lab.clip import CLIPTextModel
from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.image_processor import VaeImageProcessor, check_output_type
from flux_lab.latents import prepare_noise
from flux_lab.prompt import token_ids
from flux_lab.sd15.checkpoints import LAYOUT, Scheduler, load_scheduler, load_unet
from flux_lab.sd15.ddpm import DDPMScheduler
from flux_lab.sd15.unet import UNet2DConditionModel
from flux_lab.shapes import shaped
from flux_lab.tokenizer import check_texts

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class StableDiffusionPipelineOutput:
    """`images`: PIL images, an array [batch, height, width, 3] or a tensor [batch, 3, height, width] in 0 ... 1, or latents."""

    images: list[Image.Image] | np.ndarray | Tensor


@dataclass
class DenoisingState:
    """What the loop holds after an evaluation of the network. Whoever iterates may replace `latents`: the next step goes on from them.

    `sample` are the latents before, at `timestep`; `model_output` what the network predicted in them, guided; `x0` the picture that
    follows from both; `latents` where the scheduler went.
    """

    index: int
    timestep: int
    sample: Float[Tensor, "batch channels rows columns"]
    model_output: Float[Tensor, "batch channels rows columns"]
    x0: Float[Tensor, "batch channels rows columns"]
    latents: Float[Tensor, "batch channels rows columns"]
    decode: Callable[[Tensor], list[Image.Image]] = field(repr=False)

    def image(self, of: str = "x0") -> Image.Image:
        """The first picture of the batch, decoded from `x0`, `latents` or `sample`."""
        if of not in ("x0", "latents", "sample"):
            raise ValueError(f"image: expected of='x0', 'latents' or 'sample', got {of!r}")
        return self.decode(getattr(self, of)[:1])[0]


class StableDiffusionPipeline:
    """SD 1.5, from prompt to image. Its parts have the names of their folders in a checkpoint."""

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
    ):
        self.unet, self.scheduler, self.vae = unet, scheduler, vae
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.vae_scale_factor = vae.config.vae_scale_factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @shaped
    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], argument: str = "prompt") -> Float[Tensor, "batch length text_dim"]:
        """CLIP's last hidden states, one vector for each of `length` tokens, padding included."""
        length = self.tokenizer.model_max_length
        return self.text_encoder(
            token_ids(self.tokenizer, check_texts(prompt, argument), length, argument, self.text_encoder)
        ).last_hidden_state

    @shaped
    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch channels rows columns"], output_type: str = "pil") -> Any:
        """Latents to images; `output_type` as in `__call__`."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self.image_processor.postprocess(self.vae.decode(latents), output_type=output_type)

    @shaped
    @torch.no_grad()
    def steps(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Float[Tensor, "batch channels rows columns"] | None = None,
        prompt_embeds: Float[Tensor, "prompts length text_dim"] | None = None,
        negative_prompt_embeds: Float[Tensor, "negatives length text_dim"] | None = None,
    ) -> Iterator[DenoisingState]:
        """Generate, one state for each evaluation of the network: PNDM makes one more than `num_inference_steps`.

        `height` and `width` are in pixels, multiples of 8, by default the checkpoint's. `guidance_scale` above 1 uses the negative
        prompt, by default an empty one; at or below 1 there is none, and one prediction a step. `generator`: one, or one for each picture.
        `latents`: noise to start from. The embeddings take the place of the prompts. Raises ValueError or TypeError, naming the argument.
        """
        # 1. Check the arguments, fill in the checkpoint's own size.
        rows, columns = self._latent_size(height, width)

        # 2. Encode the prompt, and, for guidance, the negative prompt before it.
        text = self._text("prompt", prompt, prompt_embeds, num_images_per_prompt)
        batch, guided = len(text), guidance_scale > 1
        if guided:
            given = negative_prompt if negative_prompt is not None or negative_prompt_embeds is not None else ""
            negative = self._text("negative_prompt", given, negative_prompt_embeds, num_images_per_prompt)
            text = torch.cat([_for_each(negative, batch, num_images_per_prompt), text])

        # 3. Draw the noise: latents are a picture of 4 channels, not tokens.
        shape = (batch, self.unet.config.in_channels, rows, columns)
        latents = prepare_noise(shape, generator, text.dtype, text.device) if latents is None else latents.to(text)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected {list(shape)}, got {list(latents.shape)}")

        # 4. Choose the timesteps.
        self.scheduler.set_timesteps(num_inference_steps, device=text.device)
        scheduler = copy.copy(self.scheduler)  # it counts the steps of this generation
        random = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}

        # 5. Walk from noise to picture: predict the noise, twice for guidance, and take a step.
        for index, timestep in enumerate(scheduler.timesteps):
            sample = latents
            model_output = self.unet(torch.cat([sample] * 2) if guided else sample, timestep, text)
            if guided:
                without, with_prompt = model_output.chunk(2)
                model_output = without + guidance_scale * (with_prompt - without)
            x0 = scheduler.predict_original_sample(model_output, timestep, sample)
            latents = scheduler.step(model_output, timestep, sample, **random)
            state = DenoisingState(index, int(timestep), sample, model_output, x0, latents, self.decode)
            yield state
            latents = state.latents

    def __call__(self, prompt: str | Sequence[str] | None = None, *, output_type: str = "pil", **arguments: Any) -> Any:
        """Generate images: a StableDiffusionPipelineOutput. All further arguments are those of `steps`.

        `output_type` is "pil", "np", "pt" or "latent".
        """
        check_output_type(output_type)
        for state in self.steps(prompt, **arguments):
            latents = state.latents

        # 6. Undo the scaling, decode.
        return StableDiffusionPipelineOutput(latents if output_type == "latent" else self.decode(latents, output_type))

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Rows and columns of the latents."""
        sizes = []
        for name, value in (("height", height), ("width", width)):
            value = self.unet.config.sample_size * self.vae_scale_factor if value is None else value
            if not isinstance(value, int) or value < self.vae_scale_factor or value % self.vae_scale_factor:
                raise ValueError(f"{name}: expected a multiple of {self.vae_scale_factor} pixels, got {value!r}")
            sizes.append(value // self.vae_scale_factor)
        return sizes[0], sizes[1]

    def _text(self, argument: str, prompt: str | Sequence[str] | None, embeds: Tensor | None, images: int) -> Tensor:
        """Hidden states of the prompt, or those given, repeated for every image."""
        if (prompt is None) == (embeds is None):
            raise ValueError(f"{argument}: expected either {argument} or {argument}_embeds, got {'neither' if prompt is None else 'both'}")
        embeds = self.encode_prompt(prompt, argument) if embeds is None else embeds
        return repeat(embeds, "batch length dim -> (batch images) length dim", images=images)


def load_sd15(
    path: str | Path | None = None, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> StableDiffusionPipeline:
    """Load SD 1.5 from a folder in the diffusers layout or a hub id; by default the bundled example. Raises CheckpointError.

    `dtype=None`: that of the UNet's file. A safety checker, which SD 1.5 has, is not loaded.
    """
    check_device(device)
    folder = local_folder(data_dir() / "sd15-mini" if path is None else path, LAYOUT.parts, LAYOUT.components)
    read_model_index(folder, LAYOUT)
    unet = load_unet(folder / "unet", dtype, device)
    dtype = next(unet.parameters()).dtype
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=load_scheduler(folder / "scheduler"),
        vae=load_autoencoder(folder / "vae", dtype, device),
        text_encoder=load_clip(folder / "text_encoder", dtype, device),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )


def _for_each(negative: Tensor, batch: int, images: int) -> Tensor:
    """The negative prompt's hidden states, one for each of the batch: a single one serves all."""
    if len(negative) not in (images, batch):
        raise ValueError(f"negative_prompt: expected one, or one for each of the {batch // images} prompts, got {len(negative) // images}")
    return negative if len(negative) == batch else repeat(negative[:1], "1 length dim -> batch length dim", batch=batch)
