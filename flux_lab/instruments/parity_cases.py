"""The cases of parity: for every component a small function that gives what ours and the reference give for the same weights and inputs.

The references, diffusers and transformers, are imported where they are used.
"""

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flux_lab.attention import FluxAttention
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.blocks import FluxSingleTransformerBlock, FluxTransformerBlock
from flux_lab.clip import CLIPTextModel
from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.config import (
    FLUX_DEV_SCHEDULER,
    FLUX_MINI,
    FLUX_SCHNELL_SCHEDULER,
    MINI_CLIP,
    MINI_T5,
    MINI_VAE,
    FlowMatchEulerDiscreteSchedulerConfig,
)
from flux_lab.embeddings import CombinedTimestepGuidanceTextProjEmbeddings, get_timestep_embedding
from flux_lab.image_processor import VaeImageProcessor
from flux_lab.latents import PATCH, pack_latents, prepare_latent_image_ids, unpack_latents
from flux_lab.normalization import EPS, AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from flux_lab.pipeline import FluxPipeline
from flux_lab.rope import FluxPosEmbed, apply_rotary_emb
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift, default_sigmas
from flux_lab.t5 import T5EncoderModel
from flux_lab.t5_tokenizer import T5Tokenizer
from flux_lab.transformer import ROPE_THETA, TIME_SCALE, FluxTransformer2DModel

ALL = (torch.float32, torch.bfloat16, torch.float16)
FULL = (torch.float32,)
# Two units in the last place of 1.0.
HALF_TOLERANCE = {torch.bfloat16: 2 * 2.0**-7, torch.float16: 2 * 2.0**-10}
# Small, and all different, so that no axis can be taken for another.
BATCH, LENGTH, ROWS, COLUMNS = 2, 5, 4, 3
PROMPTS = {"prompt": "a large shiny red sphere left of a small blue cube", "prompt_2": "a red sphere on a wooden floor"}
NEGATIVE = {"negative_prompt": "a green cone on a dark floor", "true_cfg_scale": 2.0}


class Pair(NamedTuple):
    """What both sides gave for the same inputs, tensor by tensor."""

    ours: list[Tensor]
    reference: list[Tensor]


class Case(NamedTuple):
    """One row: `file` of ours against the `reference` class. `run(dtype)` gives the Pair, `bound(ours, reference)` judges two tensors."""

    name: str
    file: str
    reference: str
    run: Callable[[torch.dtype], Pair]
    bound: Callable[[Tensor, Tensor], bool]
    dtypes: tuple[torch.dtype, ...] = ALL


# ---- bounds -------------------------------------------------------------------------------------------------------------


def exact(ours: Tensor, reference: Tensor) -> bool:
    return torch.equal(ours, reference)


def close(ours: Tensor, reference: Tensor) -> bool:
    """fp32: within 1e-5, absolute and relative; half precision: within two units in the last place."""
    half = HALF_TOLERANCE.get(reference.dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if half is None else {"rtol": half, "atol": 0.0}
    return torch.allclose(ours.double(), reference.double(), **tolerance)


def same_picture(ours: Tensor, reference: Tensor) -> bool:
    """8-bit pictures: at most one value in a thousand differs, and by 1; and they are pictures, not flat fields."""
    difference = (ours.int() - reference.int()).abs()
    return difference.max() <= 1 and (difference > 0).double().mean() <= 1e-3 and reference.double().std() > 20


# ---- the same weights and inputs on both sides --------------------------------------------------------------------------


def random_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers for every parameter, of norms and biases too, such that activations stay of order one."""
    draw = drawing(torch.float32, seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.1 * draw(*parameter.shape) + (1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(draw(*parameter.shape) / parameter[0].numel() ** 0.5)
    return module


def drawing(dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """A function that gives the next standard normal tensor of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def both(ours: nn.Module, reference: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Ours and the reference with the same random weights."""
    ours.load_state_dict(random_(reference).state_dict(), strict=True)
    return ours.to(dtype).eval(), reference.to(dtype).eval()


def run_both(ours: nn.Module, reference: nn.Module, dtype: torch.dtype, *inputs: Any, **named: Any) -> Pair:
    """Both sides on the same inputs, for modules that give a tensor or a tuple of tensors."""
    return Pair(*(tensors(model(*inputs, **named)) for model in both(ours, reference, dtype)))


def tensors(output: Any) -> list[Tensor]:
    """All tensors in an output, in order. The reference's outputs are dictionaries."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for item in (output.values() if isinstance(output, dict) else output) for tensor in tensors(item)]


def texts(count: int = 300, seed: int = 0) -> list[str]:
    """Captions, numbers, other scripts, emoji, white space and special tokens, in random order."""
    words = "a red cube Sphere BLUE left of behind, shiny matte floor. 1234 3.5 don't naïve Ελλάς ΣΑΣ Привет 你好 שלום ﬁ ½ 🎨 👩‍🚀 ! -- _"
    pieces = [*words.split(" "), "e\u0301", "\t", "\n", "\u200b", "<|endoftext|>", "</s>", "<pad>"]
    choose = random.Random(seed)
    return ["", *(choose.choice(["", " ", "  "]).join(choose.choices(pieces, k=choose.randint(1, 30))) for _ in range(count - 1))]


# ---- text ---------------------------------------------------------------------------------------------------------------


def clip_tokenizer(dtype: torch.dtype, folder: Path) -> Pair:
    from transformers import CLIPTokenizer as Reference

    return same_ids(CLIPTokenizer.from_pretrained(folder / "tokenizer"), Reference.from_pretrained(folder / "tokenizer"))


def t5_tokenizer(dtype: torch.dtype, folder: Path) -> Pair:
    from transformers import T5TokenizerFast as Reference

    return same_ids(T5Tokenizer.from_pretrained(folder / "tokenizer_2"), Reference.from_pretrained(folder / "tokenizer_2"))


def same_ids(ours: CLIPTokenizer | T5Tokenizer, reference: Any) -> Pair:
    length = ours.model_max_length
    expected = reference(texts(), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return Pair([ours(texts(), max_length=length)], [expected])


def clip(dtype: torch.dtype) -> Pair:
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Reference

    config = CLIPTextConfig.from_dict(MINI_CLIP.to_dict() | {"bos_token_id": None})
    ours, reference = both(CLIPTextModel(MINI_CLIP), Reference(config), dtype)
    ids = token_ids(MINI_CLIP.vocab_size, MINI_CLIP.max_position_embeddings)
    expected = reference(ids)
    return Pair(list(ours(ids)), [expected.last_hidden_state, expected.pooler_output])


def t5(dtype: torch.dtype) -> Pair:
    from transformers import T5Config
    from transformers import T5EncoderModel as Reference

    ours, reference = both(T5EncoderModel(MINI_T5), Reference(T5Config.from_dict(MINI_T5.to_dict())), dtype)
    if dtype == torch.float16:
        # What `from_pretrained` does on either side: the results of `wo` are too large for fp16.
        for model in (ours, reference):
            for name, module in model.named_modules():
                if name.endswith(".wo"):
                    module.float()
    ids = token_ids(MINI_T5.vocab_size, LENGTH)
    return Pair([ours(ids)], [reference(ids).last_hidden_state])


def token_ids(vocab_size: int, length: int) -> Tensor:
    return torch.randint(vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(0))


# ---- latents and schedule -----------------------------------------------------------------------------------------------


def latents(dtype: torch.dtype) -> Pair:
    from diffusers import FluxPipeline as Reference

    channels, height, width = MINI_VAE.latent_channels, ROWS * PATCH, COLUMNS * PATCH
    scale = MINI_VAE.vae_scale_factor
    given = drawing(dtype)(BATCH, channels, height, width)
    tokens = pack_latents(given)
    ours = [tokens, unpack_latents(tokens, height * scale, width * scale, scale), prepare_latent_image_ids(ROWS, COLUMNS, dtype)]
    return Pair(
        ours,
        [
            Reference._pack_latents(given, BATCH, channels, height, width),
            Reference._unpack_latents(tokens, height * scale, width * scale, scale),
            Reference._prepare_latent_image_ids(BATCH, ROWS, COLUMNS, "cpu", dtype),
        ],
    )


def scheduler(dtype: torch.dtype) -> Pair:
    """The tables of four configurations, and all steps of each."""
    static = FlowMatchEulerDiscreteSchedulerConfig(shift=3.0)
    configs = [FLUX_DEV_SCHEDULER, FLUX_SCHNELL_SCHEDULER, static, dataclasses.replace(FLUX_DEV_SCHEDULER, shift_terminal=0.02)]
    pairs = [schedule(config, dtype) for config in configs]
    return Pair([tensor for pair in pairs for tensor in pair.ours], [tensor for pair in pairs for tensor in pair.reference])


def schedule(config: FlowMatchEulerDiscreteSchedulerConfig, dtype: torch.dtype, steps: int = 7) -> Pair:
    from diffusers import FlowMatchEulerDiscreteScheduler as Reference

    pair = Pair([], [])
    for side, given in zip((FlowMatchEulerDiscreteScheduler(config), Reference.from_config(config.to_dict())), pair, strict=True):
        draw = drawing(dtype)
        sample = draw(BATCH, LENGTH)
        side.set_timesteps(sigmas=default_sigmas(steps), mu=calculate_shift(ROWS * COLUMNS))
        given += [side.sigmas, side.timesteps]
        for timestep in side.timesteps:
            moved = side.step(draw(BATCH, LENGTH), timestep, sample)
            sample = moved if isinstance(moved, Tensor) else moved.prev_sample
            given.append(sample)
    return pair


# ---- the transformer's parts --------------------------------------------------------------------------------------------


def conditioning(dtype: torch.dtype) -> Pair:
    from diffusers.models import embeddings

    sizes = FLUX_MINI.inner_dim, FLUX_MINI.pooled_projection_dim
    numbers = torch.linspace(0.01, 1, BATCH).to(dtype) * TIME_SCALE
    guidance = torch.full((BATCH,), 3.5, dtype=dtype) * TIME_SCALE
    pooled = drawing(dtype)(BATCH, FLUX_MINI.pooled_projection_dim)
    ours, reference = CombinedTimestepGuidanceTextProjEmbeddings(*sizes), embeddings.CombinedTimestepGuidanceTextProjEmbeddings(*sizes)
    vectors = run_both(ours, reference, dtype, numbers, guidance, pooled)
    sinusoids = reference.time_proj(numbers)
    return Pair([get_timestep_embedding(numbers), *vectors.ours], [sinusoids, *vectors.reference])


def rope(dtype: torch.dtype) -> Pair:
    from diffusers.models.embeddings import apply_rotary_emb as reference_apply
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed as Reference

    ids = position_ids(dtype)
    query = drawing(dtype)(BATCH, len(ids), FLUX_MINI.num_attention_heads, FLUX_MINI.attention_head_dim)
    ours = FluxPosEmbed(theta=ROPE_THETA, axes_dim=FLUX_MINI.axes_dims_rope)(ids)
    reference = Reference(theta=ROPE_THETA, axes_dim=FLUX_MINI.axes_dims_rope)(ids)
    return Pair([*ours, apply_rotary_emb(query, ours)], [*reference, reference_apply(query, reference, sequence_dim=1)])


def position_ids(dtype: torch.dtype) -> Tensor:
    """Of the text, then of the image."""
    image = prepare_latent_image_ids(ROWS, COLUMNS, dtype)
    return torch.cat([image.new_zeros(LENGTH, image.shape[1]), image])


def rotation(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return FluxPosEmbed(theta=ROPE_THETA, axes_dim=FLUX_MINI.axes_dims_rope)(position_ids(dtype))


def norm_zero(dtype: torch.dtype) -> Pair:
    from diffusers.models.normalization import AdaLayerNormZero as Reference

    dim, (x, temb) = FLUX_MINI.inner_dim, stream_and_conditioning(dtype)
    ours, reference = both(AdaLayerNormZero(dim), Reference(dim), dtype)
    return Pair(tensors(ours(x, temb)), list(reference(x, emb=temb)))


def norm_zero_single(dtype: torch.dtype) -> Pair:
    from diffusers.models.normalization import AdaLayerNormZeroSingle as Reference

    dim, (x, temb) = FLUX_MINI.inner_dim, stream_and_conditioning(dtype)
    ours, reference = both(AdaLayerNormZeroSingle(dim), Reference(dim), dtype)
    return Pair(tensors(ours(x, temb)), list(reference(x, emb=temb)))


def norm_continuous(dtype: torch.dtype) -> Pair:
    from diffusers.models.normalization import AdaLayerNormContinuous as Reference

    dim = FLUX_MINI.inner_dim
    reference = Reference(dim, dim, elementwise_affine=False, eps=EPS)
    return run_both(AdaLayerNormContinuous(dim), reference, dtype, *stream_and_conditioning(dtype))


def stream_and_conditioning(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = drawing(dtype)
    return draw(BATCH, ROWS * COLUMNS, FLUX_MINI.inner_dim), draw(BATCH, FLUX_MINI.inner_dim)


def attention(dtype: torch.dtype) -> Pair:
    """Joint attention of both kinds: text and image with projections of their own, and one sequence."""
    from diffusers.models.transformers.transformer_flux import FluxAttention as Reference

    dim, draw = FLUX_MINI.inner_dim, drawing(dtype)
    sizes = {"query_dim": dim, "heads": FLUX_MINI.num_attention_heads, "dim_head": FLUX_MINI.attention_head_dim}
    image, text, rotary = draw(BATCH, ROWS * COLUMNS, dim), draw(BATCH, LENGTH, dim), {"image_rotary_emb": rotation(dtype)}
    fixed = {"bias": True, "out_dim": dim, "eps": EPS}
    joint = FluxAttention(**sizes, added_kv_proj_dim=dim), Reference(**sizes, **fixed, added_kv_proj_dim=dim, context_pre_only=False)
    single = FluxAttention(**sizes, pre_only=True), Reference(**sizes, **fixed, pre_only=True)
    first = run_both(*joint, dtype, hidden_states=image, encoder_hidden_states=text, **rotary)
    second = run_both(*single, dtype, hidden_states=torch.cat([text, image], dim=1), **rotary)
    return Pair(first.ours + second.ours, first.reference + second.reference)


def double_block(dtype: torch.dtype) -> Pair:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock as Reference

    return block(FluxTransformerBlock, Reference, dtype)


def single_block(dtype: torch.dtype) -> Pair:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock as Reference

    return block(FluxSingleTransformerBlock, Reference, dtype)


def block(ours: type[nn.Module], reference: type[nn.Module], dtype: torch.dtype) -> Pair:
    dim, draw = FLUX_MINI.inner_dim, drawing(dtype)
    sizes = {"dim": dim, "num_attention_heads": FLUX_MINI.num_attention_heads, "attention_head_dim": FLUX_MINI.attention_head_dim}
    return run_both(
        ours(**sizes),
        reference(**sizes),
        dtype,
        hidden_states=draw(BATCH, ROWS * COLUMNS, dim),
        encoder_hidden_states=draw(BATCH, LENGTH, dim),
        temb=draw(BATCH, dim),
        image_rotary_emb=rotation(dtype),
    )


def transformer(dtype: torch.dtype) -> Pair:
    """All 57 blocks, at the miniature's width."""
    from diffusers import FluxTransformer2DModel as Reference

    draw, ids = drawing(dtype), position_ids(dtype)
    return run_both(
        FluxTransformer2DModel(FLUX_MINI),
        Reference.from_config(FLUX_MINI.to_dict()),
        dtype,
        hidden_states=draw(BATCH, ROWS * COLUMNS, FLUX_MINI.in_channels),
        encoder_hidden_states=draw(BATCH, LENGTH, FLUX_MINI.joint_attention_dim),
        pooled_projections=draw(BATCH, FLUX_MINI.pooled_projection_dim),
        timestep=torch.linspace(0.1, 0.9, BATCH).to(dtype),
        img_ids=ids[LENGTH:],
        txt_ids=ids[:LENGTH],
        guidance=torch.full((BATCH,), 3.5),
    )


# ---- pictures -----------------------------------------------------------------------------------------------------------


def autoencoders(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    from diffusers import AutoencoderKL as Reference

    return both(AutoencoderKL(MINI_VAE), Reference.from_config(MINI_VAE.to_dict()), dtype)


def encode(dtype: torch.dtype) -> Pair:
    ours, reference = autoencoders(dtype)
    scale = MINI_VAE.vae_scale_factor
    images = drawing(dtype)(BATCH, MINI_VAE.in_channels, ROWS * scale, COLUMNS * scale)
    posterior, expected = ours.encode(images), reference.encode(images).latent_dist
    return Pair([posterior.mean, posterior.logvar], [expected.mean, expected.logvar])


def decode(dtype: torch.dtype) -> Pair:
    ours, reference = autoencoders(dtype)
    given = drawing(dtype)(BATCH, MINI_VAE.latent_channels, ROWS, COLUMNS)
    return Pair([ours.decode(given)], [reference.decode(given).sample])


def image_processor(dtype: torch.dtype) -> Pair:
    """A picture to a tensor, resized; a tensor to the bytes of pictures."""
    from diffusers.image_processor import VaeImageProcessor as Reference

    pixels = np.random.default_rng(0).integers(0, 256, size=(50, 37, 3), dtype=np.uint8)
    images = drawing(dtype)(BATCH, MINI_VAE.in_channels, ROWS, COLUMNS)
    return Pair(
        *([side.preprocess(Image.fromarray(pixels)), bytes_of(side.postprocess(images))] for side in (VaeImageProcessor(), Reference()))
    )


def bytes_of(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def pipeline(dtype: torch.dtype, folder: Path) -> Pair:
    """The whole of it, from one folder: prompt, prompt_2 and a negative prompt to a picture."""
    from diffusers import FluxPipeline as Reference

    ours, reference = FluxPipeline.from_pretrained(folder, dtype=dtype), Reference.from_pretrained(folder, dtype=dtype)
    size = ours.vae.config.sample_size
    arguments = PROMPTS | NEGATIVE | {"num_inference_steps": 4, "max_sequence_length": ours.tokenizer_2.model_max_length}
    pair = Pair([], [])
    for pipe, given in zip((ours, reference), pair, strict=True):
        pipe.set_progress_bar_config(disable=True)
        given.append(bytes_of(pipe(**arguments, height=size, width=size, generator=torch.Generator().manual_seed(0)).images))
    return pair


# ---- all of them --------------------------------------------------------------------------------------------------------


def cases(folder: Path | None) -> list[Case]:
    """All rows, in the order of the data. Without a checkpoint `folder`: all but the tokenizers and the whole pipeline."""
    tokenizers = [
        Case("CLIP tokenizer", "clip_tokenizer.py", "transformers CLIPTokenizer", partial(clip_tokenizer, folder=folder), exact, FULL),
        Case("T5 tokenizer", "t5_tokenizer.py", "transformers T5Tokenizer", partial(t5_tokenizer, folder=folder), exact, FULL),
    ]
    components = [
        Case("CLIP text encoder", "clip.py", "transformers CLIPTextModel", clip, close),
        Case("T5 encoder", "t5.py", "transformers T5EncoderModel", t5, close),
        Case("pack, unpack, ids", "latents.py", "diffusers FluxPipeline", latents, exact),
        Case("sigmas and steps", "scheduler.py", "diffusers FlowMatchEulerDiscreteScheduler", scheduler, exact),
        Case("conditioning", "embeddings.py", "diffusers CombinedTimestepGuidanceTextProjEmbeddings", conditioning, close),
        Case("RoPE", "rope.py", "diffusers FluxPosEmbed, apply_rotary_emb", rope, close),
        Case("adaptive norm, double", "normalization.py", "diffusers AdaLayerNormZero", norm_zero, close),
        Case("adaptive norm, single", "normalization.py", "diffusers AdaLayerNormZeroSingle", norm_zero_single, close),
        Case("adaptive norm, last", "normalization.py", "diffusers AdaLayerNormContinuous", norm_continuous, close),
        Case("joint attention", "attention.py", "diffusers FluxAttention", attention, close),
        Case("double-stream block", "blocks.py", "diffusers FluxTransformerBlock", double_block, close),
        Case("single-stream block", "blocks.py", "diffusers FluxSingleTransformerBlock", single_block, close),
        Case("transformer, 57 blocks", "transformer.py", "diffusers FluxTransformer2DModel", transformer, close),
        Case("VAE encoder", "autoencoder.py", "diffusers AutoencoderKL", encode, close),
        Case("VAE decoder", "autoencoder.py", "diffusers AutoencoderKL", decode, close),
        Case("image processor", "image_processor.py", "diffusers VaeImageProcessor", image_processor, exact),
    ]
    whole = Case("whole pipeline, 8-bit", "pipeline.py", "diffusers FluxPipeline", partial(pipeline, folder=folder), same_picture, FULL)
    return components if folder is None else [*tokenizers, *components, whole]
