"""The fast path: `fast(pipe)` is a pipeline with the same weights and the same pictures, within rounding, in less time.

Its parts are made from the reference's: fast_transformer.py, fast_text.py, fast_autoencoder.py. Its loop is the reference's; what the
steps have in common is done at the first, and true CFG is one batch of two.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_lab.inference.fast_autoencoder import fast_autoencoder
from flux_lab.inference.fast_text import fast_text_encoder
from flux_lab.inference.fast_transformer import FastFluxTransformer2DModel, Prepared, StepChange
from flux_lab.pipeline import FluxPipeline
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
    minutes at the first picture of each size. `batch_cfg=False`: true CFG in two passes, for less memory. These two change the picture:
    `tiling` of the decoder, a little; `cache_threshold` above 0, see `cache_error`. Raises ValueError for a pipe that is quantized,
    hoisted or fast already.
    """
    if isinstance(pipe, FastFluxPipeline):
        raise ValueError("pipe: expected a pipeline of the reference's models, got one that is fast already")
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
    """Made by `fast`. It has the reference's loop; what it prepares for one is kept until the next."""

    def __init__(self, *, batch_cfg: bool, **parts: Any):
        super().__init__(**parts)
        self.batch_cfg = batch_cfg
        self._texts: list[PromptEmbeds] = []
        self._copies: list[Tensor] = []
        self._passes: list[Prepared] = []

    def encode_prompt(self, *prompts: Any, **options: Any) -> PromptEmbeds:
        with checks(False):
            return super().encode_prompt(*prompts, **options)

    def decode(self, latents: Tensor, height: int, width: int, output_type: str = "pil") -> Any:
        with checks(False):
            return super().decode(latents, height, width, output_type)

    def save_pretrained(self, folder: str | Path, tokenizers: str | Path) -> None:
        raise TypeError("save_pretrained: a fast pipeline has fused weights; save the pipeline that it was made from")

    @property
    def cache_log(self) -> list[StepChange]:
        """What caching did at every step of the last generation: [] where it is off."""
        return self._passes[0].log if self._passes else []

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
        """As the reference's. What does not depend on the latents is computed at the first step, and again only for another text."""
        given = [tensor for text in texts for tensor in text]
        if index == 0 or texts is not self._texts or not all(map(torch.equal, given, self._copies)):
            self._texts, self._copies = texts, [tensor.clone() for tensor in given]  # which tell what is changed in place
            self._passes = self._prepare(texts, timesteps, img_ids, guidance)
        copies = [latents.repeat(len(each.context) // len(latents), 1, 1) for each in self._passes]
        velocity = torch.cat([self.transformer.step(copy, each, index) for copy, each in zip(copies, self._passes, strict=True)])
        if len(texts) == 1:
            return velocity
        velocity, without = velocity.chunk(2)
        return without + true_cfg_scale * (velocity - without)

    def _prepare(self, texts: list[PromptEmbeds], timesteps: Tensor, img_ids: Tensor, guidance: Tensor | None) -> list[Prepared]:
        """What the transformer needs of the texts, at all steps: for each text, or for one batch of both if they are equally long."""
        if self.batch_cfg and len(texts) > 1 and len({text.prompt_embeds.shape[1] for text in texts}) == 1:
            embeds, pooled, _ = zip(*texts, strict=True)
            texts = [PromptEmbeds(torch.cat(embeds), torch.cat(pooled), texts[0].text_ids)]
        timesteps = timesteps[:, None].to(img_ids.dtype) / TIME_SCALE
        scale = None if guidance is None else guidance[:1]  # the same for the whole batch
        return [
            self.transformer.prepare(text.prompt_embeds, text.pooled_prompt_embeds, timesteps, img_ids, text.text_ids, scale)
            for text in texts
        ]


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
