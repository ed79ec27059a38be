"""The fast path: `fast(pipe)` is a pipeline with the same weights and the same pictures, within rounding, in less time.

Its parts are made from the reference's: fast_transformer.py, fast_text.py, fast_autoencoder.py. Its loop is the reference's with all
that can be done before it done before it, and true CFG as one batch of two.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_lab.inference.fast_autoencoder import fast_autoencoder
from flux_lab.inference.fast_text import fast_text_encoder
from flux_lab.inference.fast_transformer import FastFluxTransformer2DModel, Prepared, StepChange
from flux_lab.pipeline import DenoisingState, FluxPipeline, _check_scales, _for_each, _use_negative
from flux_lab.prompt import PromptEmbeds
from flux_lab.shapes import checks
from flux_lab.transformer import TIME_SCALE

MODELS = ("transformer", "text_encoder", "text_encoder_2", "vae")


@torch.no_grad()
def fast(
    pipe: FluxPipeline,
    *,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    tiling: bool = False,
    batch_cfg: bool = True,
    cache_threshold: float = 0.0,
) -> "FastFluxPipeline":
    """A pipeline as fast as we can make it, with the calls of `pipe` and, within fp32 rounding, its results.

    It shares the weights of `pipe` where they need not be fused; drop `pipe` to free the others. `dtype`: such as torch.bfloat16, half
    the memory and, where the processor has it, more speed. `compile`: the blocks by torch.compile, which needs a C++ compiler and takes
    a minute at the first picture. `batch_cfg=False`: true CFG in two passes, for less memory. These two change the picture: `tiling` of
    the decoder, a little; `cache_threshold` above 0, see `cache_error`. Raises ValueError for a pipe that is quantized or hoisted.
    """
    if not 0 <= cache_threshold < 1:
        raise ValueError(f"cache_threshold: expected a relative change from 0 (off) to below 1, got {cache_threshold}")
    own = next(pipe.transformer.parameters()).dtype
    if dtype == torch.float16 and own != dtype:
        raise ValueError("dtype: T5 needs some layers in float32 beside float16; load the pipeline with dtype=torch.float16 instead")
    models = {name: getattr(pipe, name) for name in MODELS}
    if dtype not in (None, own):
        models = {name: copy.deepcopy(model).to(dtype) for name, model in models.items()}
    return FastFluxPipeline(
        transformer=FastFluxTransformer2DModel(models["transformer"], compile, cache_threshold),
        text_encoder=fast_text_encoder(models["text_encoder"]),
        text_encoder_2=fast_text_encoder(models["text_encoder_2"]),
        vae=fast_autoencoder(models["vae"], tiling),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer_2,
        scheduler=copy.deepcopy(pipe.scheduler),
        batch_cfg=batch_cfg,
    )


class FastFluxPipeline(FluxPipeline):
    """Made by `fast`. `cache_log` says after a generation what caching did at every step: [] where it is off."""

    def __init__(self, *, batch_cfg: bool, **parts: Any):
        super().__init__(**parts)
        self.batch_cfg = batch_cfg
        self.cache_log: list[StepChange] = []

    def encode_prompt(self, *prompts: Any, **options: Any) -> PromptEmbeds:
        with checks(False):
            return super().encode_prompt(*prompts, **options)

    def decode(self, latents: Tensor, height: int, width: int, output_type: str = "pil") -> Any:
        with checks(False):
            return super().decode(latents, height, width, output_type)

    def save_pretrained(self, folder: str | Path, tokenizers: str | Path) -> None:
        raise TypeError("save_pretrained: a fast pipeline has fused weights; save the pipeline that it was made from")

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
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> Iterator[DenoisingState]:
        """As `FluxPipeline.steps`, whose numbered steps these are."""
        # 1. Check the arguments.
        height, width = self._size(height, width)
        _check_scales(guidance_scale, true_cfg_scale)
        use_negative = _use_negative(true_cfg_scale, negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds)

        # 2. Encode the prompts.
        options = {"num_images_per_prompt": num_images_per_prompt, "max_sequence_length": max_sequence_length}
        text = self.encode_prompt(prompt, prompt_2, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, **options)
        texts = [text]
        if use_negative:
            given = {"prompt_embeds": negative_prompt_embeds, "pooled_prompt_embeds": negative_pooled_prompt_embeds}
            texts.append(_for_each(text, self.encode_prompt(negative_prompt, negative_prompt_2, **given, **options)))

        # 3. and 4. Noise and noise levels.
        latents, img_ids = self._prepare_latents(text.prompt_embeds, height, width, generator, latents)
        self._set_timesteps(num_inference_steps, sigmas, tokens=len(img_ids), device=latents.device)

        # 5. The loop. What does not depend on the latents is computed once, and again only for a changed `prompt_embeds`.
        passes = self._prepare(texts, img_ids, guidance_scale)
        for index, timestep in enumerate(self.scheduler.timesteps):
            velocity = self._guided_velocity(latents, passes, index, true_cfg_scale if use_negative else None)
            sigma, sigma_next = self.scheduler.sigmas[index : index + 2]
            x0 = (latents - sigma * velocity).to(latents.dtype)
            latents = self.scheduler.step(
                velocity, timestep, latents, generator=generator if isinstance(generator, torch.Generator) else None
            )
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
            self.cache_log = passes[0].log
            yield state
            latents = state.latents
            if state.prompt_embeds is not texts[0].prompt_embeds:
                texts[0] = texts[0]._replace(prompt_embeds=state.prompt_embeds)
                passes = self._prepare(texts, img_ids, guidance_scale)

    def _prepare(self, texts: list[PromptEmbeds], img_ids: Tensor, guidance_scale: float) -> list[Prepared]:
        """What the transformer needs of the texts, at all steps: for each text, or for one batch of both."""
        if self.batch_cfg and len(texts) > 1:
            embeds, pooled, _ = zip(*texts, strict=True)
            texts = [PromptEmbeds(torch.cat(embeds), torch.cat(pooled), texts[0].text_ids)]
        timesteps = self.scheduler.timesteps[:, None].to(img_ids.dtype) / TIME_SCALE
        guidance = timesteps.new_full((1,), guidance_scale, dtype=torch.float32) if self.transformer.config.guidance_embeds else None
        return [
            self.transformer.prepare(text.prompt_embeds, text.pooled_prompt_embeds, timesteps, img_ids, text.text_ids, guidance)
            for text in texts
        ]

    def _guided_velocity(self, latents: Tensor, passes: list[Prepared], index: int, true_cfg_scale: float | None) -> Tensor:
        """The velocity; with true CFG that of the prompt, moved away from that of the negative prompt."""
        copies = [latents.repeat(len(each.context) // len(latents), 1, 1) for each in passes]
        velocity = torch.cat([self.transformer.step(copy, each, index) for copy, each in zip(copies, passes, strict=True)])
        if true_cfg_scale is None:
            return velocity
        velocity, without = velocity.chunk(2)
        return without + true_cfg_scale * (velocity - without)


class CacheError(NamedTuple):
    """What caching costs: steps taken, those of them that left out all blocks but the first, and the relative error of the latents."""

    steps: int
    reused: int
    error: float


def cache_error(pipe: FastFluxPipeline, seed: int = 0, **arguments: Any) -> CacheError:
    """Generate twice from one seed, with and without the caching of `pipe`, and compare. `arguments` are those of `steps`."""
    threshold, latents = pipe.transformer.cache_threshold, []
    try:
        for pipe.transformer.cache_threshold in (0.0, threshold):
            *_, last = pipe.steps(**arguments, generator=torch.Generator().manual_seed(seed))
            latents.append(last.latents.float())
    finally:
        pipe.transformer.cache_threshold = threshold
    exact, cached = latents
    return CacheError(last.index + 1, sum(step.reused for step in pipe.cache_log), ((cached - exact).norm() / exact.norm()).item())
