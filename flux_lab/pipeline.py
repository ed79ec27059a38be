"""The pipeline: a prompt becomes an image in six numbered steps.

The denoising loop is a generator, `FluxPipeline.steps`, that yields its state after every step; calling the pipeline runs it to the
end and decodes. Source: diffusers `pipelines/flux/pipeline_flux.py`.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from flux_lab import data_dir
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import (
    check_device,
    load_autoencoder,
    load_clip,
    load_scheduler,
    load_t5,
    load_transformer,
    local_folder,
    read_model_index,
    write_pipeline,
)
from flux_lab.clip import CLIPTextModel
from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.image_processor import VaeImageProcessor, check_output_type
from flux_lab.latents import PATCH, pack_latents, prepare_latent_image_ids, prepare_noise, unpack_latents
from flux_lab.prompt import PromptEmbeds, TextEncoders, encode_prompt
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift, default_sigmas
from flux_lab.shapes import shaped
from flux_lab.t5 import T5EncoderModel
from flux_lab.t5_tokenizer import T5Tokenizer
from flux_lab.transformer import TIME_SCALE, FluxTransformer2DModel

CALLBACK_TENSORS = ("latents", "prompt_embeds")


@dataclass
class FluxPipelineOutput:
    """`images`: PIL images, an array [batch, height, width, 3] or a tensor [batch, 3, height, width] in 0 ... 1, or packed latents."""

    images: list[Image.Image] | np.ndarray | Tensor


@dataclass
class DenoisingState:
    """What the loop holds after a step. Whoever iterates may replace `latents` or `prompt_embeds`: the next step goes on from them.

    `latents` are those the step arrived at, `velocity` what the network said on the way, `x0` the picture that it aimed at:
    x - sigma * velocity, with x and `sigma` from before the step. All packed: [batch, tokens, patch_channels].
    """

    index: int
    timestep: Tensor
    sigma: float
    sigma_next: float
    latents: Float[Tensor, "batch tokens patch_channels"]
    velocity: Float[Tensor, "batch tokens patch_channels"]
    x0: Float[Tensor, "batch tokens patch_channels"]
    prompt_embeds: Float[Tensor, "batch length joint_dim"]
    decode: Callable[[Tensor], list[Image.Image]] = field(repr=False)

    def image(self, of: str = "x0") -> Image.Image:
        """The first picture of the batch, decoded from `x0` or from `latents`."""
        if of not in ("x0", "latents"):
            raise ValueError(f"image: expected of='x0' or of='latents', got {of!r}")
        return self.decode(getattr(self, of)[:1])[0]


class FluxPipeline:
    """FLUX.1, from prompt to image. Its parts have the names of their folders in a checkpoint."""

    def __init__(
        self,
        *,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5Tokenizer,
    ):
        self.transformer, self.scheduler, self.vae = transformer, scheduler, vae
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.vae_scale_factor = vae.config.vae_scale_factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor * PATCH)
        self._progress_bar: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> "FluxPipeline":
        """Load a folder in the diffusers layout, or a hub id. `dtype=None`: that of the transformer's file. Raises CheckpointError,
        and ValueError for a device that is not there, before anything is downloaded."""
        check_device(device)
        folder = local_folder(path)
        read_model_index(folder)
        transformer = load_transformer(folder / "transformer", dtype, device)
        dtype = next(transformer.parameters()).dtype
        return cls(
            transformer=transformer,
            scheduler=load_scheduler(folder / "scheduler"),
            vae=load_autoencoder(folder / "vae", dtype, device),
            text_encoder=load_clip(folder / "text_encoder", dtype, device),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder_2=load_t5(folder / "text_encoder_2", dtype, device),
            tokenizer_2=T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        )

    def save_pretrained(self, folder: str | Path, tokenizers: str | Path) -> None:
        """Write a folder in the diffusers layout. `tokenizers`: the folder whose tokenizer/ and tokenizer_2/ are copied."""
        models = {name: getattr(self, name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")}
        copied = {name: Path(tokenizers) / name for name in ("tokenizer", "tokenizer_2")}
        write_pipeline(folder, models=models, scheduler=self.scheduler, tokenizers=copied)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bar of `__call__`; `disable=True` hides it."""
        self._progress_bar = options

    def encode_prompt(
        self, prompt: str | Sequence[str] | None = None, prompt_2: str | Sequence[str] | None = None, **options: Any
    ) -> PromptEmbeds:
        """`prompt.encode_prompt` with this pipeline's tokenizers and encoders."""
        encoders = TextEncoders(self.tokenizer, self.text_encoder, self.tokenizer_2, self.text_encoder_2)
        return encode_prompt(encoders, prompt, prompt_2, **options)

    @shaped
    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch tokens patch_channels"], height: int, width: int, output_type: str = "pil") -> Any:
        """Packed latents to images of `height` x `width` pixels; `output_type` as in `__call__`."""
        config = self.vae.config
        latents = unpack_latents(latents, height, width, self.vae_scale_factor)
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self.image_processor.postprocess(self.vae.decode(latents), output_type=output_type)

    @shaped
    @torch.no_grad()
    def steps(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Float[Tensor, "batch tokens patch_channels"] | None = None,
        prompt_embeds: Float[Tensor, "batch length joint_dim"] | None = None,
        pooled_prompt_embeds: Float[Tensor, "batch pooled_dim"] | None = None,
        negative_prompt_embeds: Float[Tensor, "negatives length joint_dim"] | None = None,
        negative_pooled_prompt_embeds: Float[Tensor, "negatives pooled_dim"] | None = None,
        max_sequence_length: int | None = None,
    ) -> Iterator[DenoisingState]:
        """Generate, one state a step. Several generations may be under way at the same time.

        `prompt` goes to CLIP and `prompt_2`, by default the same, to T5; both may be lists. `height` and `width` are in pixels, by
        default the checkpoint's, and are floored to what whole patches cover. `guidance_scale` is an input of the network, where it
        has a guidance embedding; `true_cfg_scale` above 1 runs a second pass with the negative prompt. `sigmas` are noise levels
        before the shift, without the final 0. `generator`: one, or one for each picture. `latents`: packed noise to start from.
        Raises ValueError or TypeError for arguments that do not fit, naming them.
        """
        # 1. Check the arguments, fill in the checkpoint's own sizes.
        height, width = self._size(height, width)
        _check_scales(guidance_scale, true_cfg_scale)
        use_negative = _use_negative(true_cfg_scale, negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds)

        # 2. Encode the prompt, and the negative prompt where it is used.
        options = {"num_images_per_prompt": num_images_per_prompt, "max_sequence_length": max_sequence_length}
        text = self.encode_prompt(prompt, prompt_2, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, **options)
        texts = [text]
        if use_negative:
            given = {"prompt_embeds": negative_prompt_embeds, "pooled_prompt_embeds": negative_pooled_prompt_embeds}
            negative = self.encode_prompt(negative_prompt, negative_prompt_2, **given, max_sequence_length=max_sequence_length)
            texts.append(_for_each(text, negative, num_images_per_prompt))

        # 3. Draw the noise, pack it into tokens, number the tokens.
        latents, img_ids = self._prepare_latents(text.prompt_embeds, height, width, generator, latents)

        # 4. Choose the noise levels: the more tokens, the longer at high noise.
        self._set_timesteps(num_inference_steps, sigmas, tokens=len(img_ids), device=latents.device)
        scheduler = copy.copy(self.scheduler)  # it counts the steps of this generation
        guidance = torch.full((len(latents),), guidance_scale, device=latents.device) if self.transformer.config.guidance_embeds else None

        # 5. Walk from noise to picture: ask for the velocity, take one Euler step, again and again.
        for index, timestep in enumerate(scheduler.timesteps):
            velocity = self._guided_velocity(latents, scheduler.timesteps, index, texts, img_ids, guidance, true_cfg_scale)
            sigma, sigma_next = scheduler.sigmas[index : index + 2]
            x0 = (latents - sigma * velocity).to(latents.dtype)
            latents = scheduler.step(velocity, timestep, latents, generator=generator if isinstance(generator, torch.Generator) else None)
            state = DenoisingState(
                index=index,
                timestep=timestep,
                sigma=sigma.item(),
                sigma_next=sigma_next.item(),
                latents=latents,
                velocity=velocity,
                x0=x0,
                prompt_embeds=texts[0].prompt_embeds,
                decode=lambda tokens: self.decode(tokens, height, width),
            )
            yield state
            latents = state.latents
            if state.prompt_embeds is not texts[0].prompt_embeds:
                texts = [texts[0]._replace(prompt_embeds=state.prompt_embeds), *texts[1:]]

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        *,
        output_type: str = "pil",
        callback_on_step_end: Callable[["FluxPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **arguments: Any,
    ) -> FluxPipelineOutput:
        """Generate images. All further arguments are those of `steps`.

        `output_type` is "pil", "np", "pt" or "latent". `callback_on_step_end(pipe, index, timestep, tensors)` is called after every
        step with the tensors named in `callback_on_step_end_tensor_inputs`, of "latents" and "prompt_embeds", and returns a dict of
        those that it changed. Raises ValueError or TypeError for arguments that do not fit, naming them.
        """
        check_output_type(output_type)
        names = callback_on_step_end_tensor_inputs
        if isinstance(names, str) or not isinstance(names, Sequence) or set(names) - set(CALLBACK_TENSORS):
            raise ValueError(f"callback_on_step_end_tensor_inputs: expected a list of some of {list(CALLBACK_TENSORS)}, got {names!r}")
        states = self.steps(prompt, prompt_2, **arguments)
        total = len(arguments["sigmas"]) if arguments.get("sigmas") is not None else arguments.get("num_inference_steps", 28)
        for state in tqdm(states, total=total, **self._progress_bar):
            if callback_on_step_end is not None:
                tensors = {name: getattr(state, name) for name in names}
                changed = callback_on_step_end(self, state.index, state.timestep, tensors)
                for name in CALLBACK_TENSORS:
                    setattr(state, name, (changed or {}).get(name, getattr(state, name)))

        # 6. Unpack the latents, undo their scaling, decode.
        if output_type == "latent":
            return FluxPipelineOutput(state.latents)
        height, width = self._size(arguments.get("height"), arguments.get("width"), warn=False)
        return FluxPipelineOutput(self.decode(state.latents, height, width, output_type))

    def _size(self, height: int | None, width: int | None, warn: bool = True) -> tuple[int, int]:
        """Pixels of the image: the checkpoint's own where not given, floored to whole patches."""
        patch = self.vae_scale_factor * PATCH
        sizes = []
        for name, value in (("height", height), ("width", width)):
            value = self.vae.config.sample_size if value is None else value
            if not isinstance(value, int) or value < patch:
                raise ValueError(f"{name}: expected a whole number of pixels, at least {patch}, got {value!r}")
            if value % patch and warn:
                warnings.warn(f"{name}: {value} is not a multiple of {patch}, using {value // patch * patch}", stacklevel=3)
            sizes.append(value // patch * patch)
        return sizes[0], sizes[1]

    def _prepare_latents(
        self,
        prompt_embeds: Tensor,
        height: int,
        width: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Packed noise and the ids of its tokens, where the text is and in its dtype."""
        batch, dtype, device = len(prompt_embeds), prompt_embeds.dtype, prompt_embeds.device
        rows, columns = (size // (self.vae_scale_factor * PATCH) for size in (height, width))
        patch_channels = self.transformer.config.in_channels
        expected = (batch, rows * columns, patch_channels)
        if latents is None:
            latents = pack_latents(
                prepare_noise((batch, patch_channels // PATCH**2, rows * PATCH, columns * PATCH), generator, dtype, device)
            )
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents: expected packed latents {list(expected)} for {height} x {width} pixels, got {list(latents.shape)}")
        return latents.to(device=device, dtype=dtype), prepare_latent_image_ids(rows, columns, dtype, device)

    def _set_timesteps(self, num_inference_steps: int, sigmas: Sequence[float] | None, tokens: int, device: torch.device) -> None:
        config = self.scheduler.config
        mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        self.scheduler.set_timesteps(sigmas=default_sigmas(num_inference_steps) if sigmas is None else sigmas, mu=mu, device=device)
        self.scheduler.set_begin_index(0)

    def _guided_velocity(
        self,
        latents: Tensor,
        timesteps: Tensor,
        index: int,
        texts: list[PromptEmbeds],
        img_ids: Tensor,
        guidance: Tensor | None,
        true_cfg_scale: float,
    ) -> Tensor:
        """The velocity at step `index`; with a second, negative text, moved away from what that gives. `texts` are a new list when
        they have changed."""
        velocity, *without = [self._velocity(latents, timesteps[index], text, img_ids, guidance) for text in texts]
        return without[0] + true_cfg_scale * (velocity - without[0]) if without else velocity

    def _velocity(self, latents: Tensor, timestep: Tensor, text: PromptEmbeds, img_ids: Tensor, guidance: Tensor | None) -> Tensor:
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled_prompt_embeds,
            # Rounded to the latents' dtype here and multiplied by 1000 again in the model: in bf16 that moves most timesteps, as upstream.
            timestep=timestep.expand(len(latents)).to(latents.dtype) / TIME_SCALE,
            img_ids=img_ids,
            txt_ids=text.text_ids,
            guidance=guidance,
        )


MINIATURES = {"dev": "flux-mini", "schnell": "flux-mini-schnell"}


def load_mini(kind: str = "dev") -> FluxPipeline:
    """The bundled miniature: FLUX.1-dev's anatomy, 1/32 of its width, trained on pictures of a table top. Needs no network.

    `kind` "schnell" is its sister for four steps, without guidance. Raises ValueError for another one.
    """
    if kind not in MINIATURES:
        raise ValueError(f"kind: expected one of {list(MINIATURES)}, got {kind!r}")
    return FluxPipeline.from_pretrained(data_dir() / MINIATURES[kind])


def _check_scales(guidance_scale: float, true_cfg_scale: float) -> None:
    for name, value in (("guidance_scale", guidance_scale), ("true_cfg_scale", true_cfg_scale)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _use_negative(
    true_cfg_scale: float, negative_prompt: Any, negative_prompt_embeds: Tensor | None, negative_pooled_prompt_embeds: Tensor | None
) -> bool:
    """Whether there is a second pass: true CFG needs a scale above 1 and a negative prompt."""
    has_negative = negative_prompt is not None or negative_prompt_embeds is not None or negative_pooled_prompt_embeds is not None
    if true_cfg_scale > 1 and not has_negative:
        warnings.warn("true_cfg_scale has no effect without a negative_prompt", stacklevel=4)
    return true_cfg_scale > 1 and has_negative


def _for_each(text: PromptEmbeds, negative: PromptEmbeds, images: int) -> PromptEmbeds:
    """The negative embeddings, one for each picture: a single one serves all, and that of a prompt all its `images`."""
    batch, given = len(text.prompt_embeds), len(negative.prompt_embeds)
    if given not in (1, batch // images):
        raise ValueError(f"negative_prompt: expected one, or one for each of the {batch // images} prompts, got {given}")
    embeds, pooled, ids = negative
    return PromptEmbeds(embeds.repeat_interleave(batch // given, dim=0), pooled.repeat_interleave(batch // given, dim=0), ids)
