"""The cases of the benchmark: the same work for the reference, for ours and for the fast path, with the same weights and inputs.

The references, diffusers and transformers, are imported where they are used.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux_lab import data_dir
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import empty_weights, load_transformer
from flux_lab.clip import CLIPTextModel
from flux_lab.config import FLUX_CLIP, FLUX_DEV, FLUX_T5, FLUX_VAE, AutoencoderKLConfig, CLIPTextConfig, FluxTransformer2DConfig, T5Config
from flux_lab.inference.fast import fast
from flux_lab.inference.fast_autoencoder import fast_autoencoder
from flux_lab.inference.fast_text import fast_text_encoder
from flux_lab.inference.fast_transformer import FastFluxTransformer2DModel
from flux_lab.latents import prepare_latent_image_ids
from flux_lab.pipeline import FluxPipeline
from flux_lab.shapes import checks
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

REFERENCE, OURS, FAST, COMPILED = "reference", "ours", "fast", "fast compiled"
UNCHECKED = "ours, no shape checks"
BLOCKS = dataclasses.replace(FLUX_DEV, num_layers=2, num_single_layers=4)
T5_LAYERS = dataclasses.replace(FLUX_T5, num_layers=2)
CLIP_LAYERS = dataclasses.replace(FLUX_CLIP, num_hidden_layers=2)
PROMPT = "a large shiny red sphere left of a small blue cube on a wooden floor"


@dataclass(frozen=True)
class Settings:
    """How much is run. The defaults are the real widths. `seconds`: after that long a case is not repeated again, but for three times."""

    repeats: int = 9
    seconds: float = 25.0
    steps: int = 28
    batches: tuple[int, ...] = (1, 8)
    growth_tokens: tuple[int, ...] = (256, 1024, 4096)
    growth_batches: tuple[int, ...] = (1, 2, 4, 8)
    blocks: FluxTransformer2DConfig = BLOCKS
    side: int = 32
    length: int = 512
    t5: T5Config = T5_LAYERS
    clip: CLIPTextConfig = CLIP_LAYERS
    vae: AutoencoderKLConfig = FLUX_VAE
    pixels: int = 512
    product: int = 2048
    folder: Path | None = None
    compile: bool = False
    device: str = "cpu"

    @property
    def checkpoint(self) -> Path:
        return self.folder or data_dir() / "flux-mini"


# The same cases at a quarter of the width and less, in a minute or two: a look, not a measurement.
QUICK = Settings(
    repeats=3,
    steps=4,
    batches=(1, 2),
    growth_tokens=(64, 256),
    growth_batches=(1, 2),
    blocks=dataclasses.replace(BLOCKS, num_attention_heads=6, joint_attention_dim=1024),
    side=16,
    length=128,
    t5=dataclasses.replace(T5_LAYERS, vocab_size=1000, d_model=1024, d_ff=2560, num_heads=16),
    clip=dataclasses.replace(CLIP_LAYERS, vocab_size=1000),
    vae=dataclasses.replace(FLUX_VAE, block_out_channels=(32, 64, 128, 128), norm_num_groups=8),
    pixels=128,
    product=512,
)


@dataclass
class Case:
    """`sides`: a call for each side, which gives a tensor, or None where there is none to compare. `weights` are in memory anyway.

    `share` of the seconds that a case may take: many cases of one group take less each.
    """

    name: str
    sides: dict[str, Callable[[], Tensor | None]]
    weights: list[nn.Module]
    dtype: torch.dtype = torch.float32
    counted: bool = True
    share: float = 1.0


def same_weights(reference: nn.Module, ours: nn.Module) -> nn.Module:
    """`reference` with the very tensors of `ours`."""
    reference.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return reference.to(next(ours.parameters()).device).eval()


# ---- the miniature ------------------------------------------------------------------------------------------------------


def end_to_end(settings: Settings, batches: slice) -> Iterator[Case]:
    """Prompt to picture, for some of the batches."""
    from diffusers import FluxPipeline as Reference

    ours = FluxPipeline.from_pretrained(settings.checkpoint, device=settings.device)
    pipes = {REFERENCE: Reference.from_pretrained(settings.checkpoint).to(settings.device), OURS: ours, FAST: fast(ours)}
    if settings.compile:
        pipes[COMPILED] = fast(ours, compile=True)
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    size = ours.vae.config.sample_size
    arguments = {"height": size, "width": size, "max_sequence_length": ours.tokenizer_2.model_max_length}

    def draw(pipe: Any, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        steps, images = settings.steps, {"num_images_per_prompt": batch, "output_type": "pt"}
        return pipe(PROMPT, num_inference_steps=steps, generator=generator, **arguments, **images).images

    models = [model for pipe in pipes.values() for model in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae)]
    for batch in settings.batches[batches]:
        sides = {side: partial(draw, pipe, batch) for side, pipe in pipes.items()}
        yield Case(f"end to end, {settings.steps} steps, batch {batch}", sides, models)


def step(settings: Settings) -> Iterator[Case]:
    """One step of the miniature: 64 image tokens, 32 of text. Ours also without the shape checks, which shows what they cost."""
    model = load_transformer(settings.checkpoint, dtype=torch.float32, device=settings.device)
    case = transformer_case("one step", model, settings, tokens=(8, 8), length=32)
    case.sides[UNCHECKED] = checks(False)(case.sides[OURS])
    yield case


def growth(settings: Settings) -> Iterator[Case]:
    """The same step with more tokens, and with more pictures at once."""
    settings = dataclasses.replace(settings, compile=False)  # each size would be compiled anew
    model = load_transformer(settings.checkpoint, dtype=torch.float32, device=settings.device)
    for tokens in settings.growth_tokens:
        side = int(tokens**0.5)
        case = transformer_case(f"one step, {side * side} tokens", model, settings, tokens=(side, side), length=32)
        yield dataclasses.replace(case, share=1 / 3)
    for batch in settings.growth_batches:
        case = transformer_case(f"one step, batch {batch}", model, settings, tokens=(8, 8), length=32, batch=batch)
        yield dataclasses.replace(case, share=1 / 3)


# ---- the real widths ----------------------------------------------------------------------------------------------------


def blocks(settings: Settings, dtype: torch.dtype) -> Iterator[Case]:
    """Two double-stream and four single-stream blocks, with what stands before and after them."""
    model = FluxTransformer2DModel(settings.blocks).to(device=settings.device, dtype=dtype).eval()
    name = f"{settings.blocks.num_layers} + {settings.blocks.num_single_layers} blocks, {str(dtype).removeprefix('torch.')}"
    yield transformer_case(name, model, settings, tokens=(settings.side, settings.side), length=settings.length)


def transformer_case(
    name: str, ours: FluxTransformer2DModel, settings: Settings, tokens: tuple[int, int], length: int, batch: int = 1
) -> Case:
    """One pass. The fast path's is one step of its loop: what it does before the loop is done before."""
    from diffusers import FluxTransformer2DModel as Reference

    with empty_weights():
        reference = Reference.from_config(ours.config.to_dict())
    reference, dtype, config = same_weights(reference, ours), next(ours.parameters()).dtype, ours.config
    draw, device = torch.Generator().manual_seed(0), settings.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device=device, dtype=dtype)

    text = {
        "encoder_hidden_states": random(batch, length, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "img_ids": prepare_latent_image_ids(*tokens, dtype, device),
        "txt_ids": torch.zeros(length, 3, dtype=dtype, device=device),
        "guidance": torch.full((batch,), 3.5, device=device) if config.guidance_embeds else None,
    }
    latents, timestep = random(batch, tokens[0] * tokens[1], config.in_channels), torch.full((batch,), 0.5, dtype=dtype, device=device)
    sides = {
        REFERENCE: lambda: reference(hidden_states=latents, timestep=timestep, **text, return_dict=False)[0],
        OURS: lambda: ours(hidden_states=latents, timestep=timestep, **text),
    }
    models = {side: FastFluxTransformer2DModel(ours, compile=side == COMPILED) for side in (FAST, *[COMPILED] * settings.compile)}
    for side, model in models.items():
        sides[side] = partial(model.step, latents, model.prepare(timesteps=timestep[None], **text), 0)
    return Case(name, sides, [ours, *models.values()], dtype)


def t5(settings: Settings) -> Iterator[Case]:
    from transformers import T5Config as ReferenceConfig
    from transformers import T5EncoderModel as Reference

    ours = T5EncoderModel(settings.t5).to(settings.device).eval()
    reference = same_weights(Reference(ReferenceConfig.from_dict(settings.t5.to_dict())), ours)
    faster, ids = fast_text_encoder(ours), token_ids(settings.t5.vocab_size, settings.length, settings.device)
    sides = {REFERENCE: lambda: reference(ids).last_hidden_state, OURS: lambda: ours(ids), FAST: lambda: faster(ids)}
    yield Case(f"T5, {settings.t5.num_layers} layers, {settings.length} tokens", sides, [ours, faster])


def clip(settings: Settings) -> Iterator[Case]:
    from transformers import CLIPTextConfig as ReferenceConfig
    from transformers import CLIPTextModel as Reference

    ours = CLIPTextModel(settings.clip).to(settings.device).eval()
    reference = same_weights(Reference(ReferenceConfig.from_dict(settings.clip.to_dict() | {"bos_token_id": None})), ours)
    length = settings.clip.max_position_embeddings
    faster, ids = fast_text_encoder(ours), token_ids(settings.clip.vocab_size, length, settings.device)
    models = {REFERENCE: reference, OURS: ours, FAST: faster}
    sides = {side: lambda model=model: model(ids).pooler_output for side, model in models.items()}
    yield Case(f"CLIP, {settings.clip.num_hidden_layers} layers, {length} tokens", sides, [ours, faster])


def token_ids(vocab_size: int, length: int, device: str) -> Tensor:
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)


def vae(settings: Settings) -> Iterator[Case]:
    from diffusers import AutoencoderKL as Reference

    ours = AutoencoderKL(settings.vae).to(settings.device).eval()
    reference, faster = same_weights(Reference.from_config(settings.vae.to_dict()), ours), fast_autoencoder(ours)
    side = settings.pixels // settings.vae.vae_scale_factor
    latents = torch.randn((1, settings.vae.latent_channels, side, side), generator=torch.Generator().manual_seed(0)).to(settings.device)
    sides = {
        REFERENCE: lambda: reference.decode(latents).sample,
        OURS: lambda: ours.decode(latents),
        FAST: lambda: faster.decode(latents),
    }
    yield Case(f"VAE decode, {settings.pixels} x {settings.pixels}", sides, [ours, reference, faster])


# ---- import -------------------------------------------------------------------------------------------------------------


def imports(settings: Settings) -> Iterator[Case]:
    """A new interpreter that imports the pipeline."""
    statements = {REFERENCE: "from diffusers import FluxPipeline", OURS: "from flux_lab import FluxPipeline"}
    statements[FAST] = "from flux_lab.inference import fast"
    sides = {
        side: partial(subprocess.run, [sys.executable, "-c", statement], check=True, capture_output=True)
        for side, statement in statements.items()
    }
    yield Case("import", {side: lambda run=run: run() and None for side, run in sides.items()}, [], counted=False)


CASES: dict[str, Callable[[Settings], Iterator[Case]]] = {
    "import": imports,
    "step": step,
    "end-to-end": partial(end_to_end, batches=slice(0, 1)),
    "end-to-end-batches": partial(end_to_end, batches=slice(1, None)),
    "clip": clip,
    "t5": t5,
    "vae": vae,
    "blocks-fp32": partial(blocks, dtype=torch.float32),
    "blocks-bf16": partial(blocks, dtype=torch.bfloat16),
    "growth": growth,
}
