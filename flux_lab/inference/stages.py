"""The three stages of a picture on the `meta` device: bytes of weights and of activations, counted while the real modules run.

`settings` are those of `memory.plan`. All blocks of one kind are alike, so models with one or two of them are run, and counted as often
as there are blocks.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flux_lab.autoencoder import AutoencoderKL
from flux_lab.clip import CLIPTextModel
from flux_lab.inference.hoisting import hoist
from flux_lab.inference.live_bytes import FusedAttention, LiveBytes, bytes_of
from flux_lab.inference.parts import Parts
from flux_lab.inference.quantization import SCHEMES, linear_names, quantize
from flux_lab.latents import PATCH
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

SCHEME_OF_BITS = {32: None, 16: None, 8: "int8", 4: "nf4"}
# While one block computes, the next one is read.
BLOCKS_IN_MEMORY = 2


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bytes of one stage. `loading`: what quantizing the largest layer takes for a moment; `activations`: all that computing takes."""

    name: str
    weights: int
    activations: int
    loading: int = 0

    @property
    def peak(self) -> int:
        return self.weights + max(self.activations, self.loading)


def encode(parts: Parts, settings: dict) -> Stage:
    """Both text encoders, and what they made."""
    batch, dtype, stream = settings["batch"], settings["dtype"], settings["stream"]
    layers = parts.text_encoder_2.num_layers
    # The first block is the only one with a position bias: the second stands for all others.
    clip, t5 = CLIPTextModel(parts.text_encoder), T5EncoderModel(dataclasses.replace(parts.text_encoder_2, num_layers=min(layers, 2)))
    clip = clip.to(dtype)
    t5, loading = _quantized(t5.to(dtype), settings["bits"])
    ids = [torch.empty(batch, length, dtype=torch.int64) for length in (parts.text_encoder.max_position_embeddings, parts.length)]

    def run() -> list[Tensor]:
        return [each for _ in range(1 + settings["negative"]) for each in (clip(ids[0]).pooler_output, t5(ids[1]))]

    weights = bytes_of(clip) + resident(t5, {"encoder.block": layers}, stream)
    return Stage("encode", weights, _activations(run, clip, t5), 0 if stream else loading)


def denoise(parts: Parts, settings: dict) -> Stage:
    """The transformer without or with modulation weights, one pass, and what the loop holds beside it."""
    batch, dtype, stream, negative = (settings[name] for name in ("batch", "dtype", "stream", "negative"))
    config, patch = parts.transformer, parts.vae.vae_scale_factor * PATCH
    tokens = (settings["height"] // patch) * (settings["width"] // patch)
    number, pooled = torch.empty(batch, dtype=dtype), torch.empty(batch, config.pooled_projection_dim, dtype=dtype)
    guidance = number if config.guidance_embeds else None
    counts = {"transformer_blocks": config.num_layers, "single_transformer_blocks": config.num_single_layers}
    shallow = dataclasses.replace(config, num_layers=min(1, config.num_layers), num_single_layers=min(1, config.num_single_layers))
    transformer = FluxTransformer2DModel(shallow).to(dtype)
    if settings["hoisted"]:
        transformer = hoist(transformer, [tuple(each for each in (number, guidance, pooled) if each is not None)])
    transformer, loading = _quantized(transformer, settings["bits"])
    inputs = {
        "hidden_states": torch.empty(batch, tokens, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, parts.length, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": pooled,
        "timestep": number,
        "img_ids": torch.empty(tokens, 3, dtype=dtype),
        "txt_ids": torch.empty(parts.length, 3, dtype=dtype),
        "guidance": guidance,
    }
    activations = _activations(lambda: transformer(**inputs), transformer)
    # What the loop holds meanwhile: latents, velocity and x0 of the step before; with true CFG the other text and its velocity.
    activations += 3 * inputs["hidden_states"].nbytes
    activations += negative * sum(inputs[name].nbytes for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"))
    return Stage(
        "denoise", resident(transformer, counts, stream, settings["steps"] * (1 + negative)), activations, 0 if stream else loading
    )


def decode(parts: Parts, settings: dict) -> Stage:
    """The autoencoder, all of it, and its decoder's feature maps."""
    dtype, scale = settings["dtype"], parts.vae.vae_scale_factor
    vae = AutoencoderKL(parts.vae).to(dtype)
    latents = torch.empty(
        settings["batch"], parts.vae.latent_channels, settings["height"] // scale, settings["width"] // scale, dtype=dtype
    )
    return Stage("decode", bytes_of(vae), _activations(lambda: vae.decode(latents), vae))


def _activations(run: Callable[[], object], *models: nn.Module) -> int:
    weights = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    with FusedAttention(), LiveBytes(ignored=weights, meta=True) as live:
        run()
    return live.peak


def _quantized(model: nn.Module, bits: int) -> tuple[nn.Module, int]:
    """The model, and what quantizing its largest layer takes beside the result."""
    scheme = SCHEME_OF_BITS[bits]
    if scheme is None:
        return model, 0
    largest = max((model.get_submodule(name) for name in linear_names(model)), key=lambda linear: linear.weight.numel())
    with LiveBytes(meta=True) as live:
        result = SCHEMES[scheme].from_linear(largest)
    return quantize(model, scheme), live.peak - bytes_of(result)


def resident(model: nn.Module, counts: dict[str, int], stream: bool, passes: int = 1) -> int:
    """Bytes of weights in memory at once, from a model with few blocks: each list's last block is there `counts` times.

    The tables of hoisted modulation, made for one pass, are there for each pass. They stay when blocks are streamed.
    """
    tables = bytes_of(model) - stored(model)
    weights, largest = stored(model), 0
    for name, count in counts.items():
        blocks = model.get_submodule(name)
        if count > len(blocks):
            tables += (count - len(blocks)) * (bytes_of(blocks[-1]) - stored(blocks[-1]))
            weights += (count - len(blocks)) * stored(blocks[-1])
        if stream:
            weights -= sum(map(stored, blocks)) + (count - len(blocks)) * stored(blocks[-1])
            largest = max([largest, *map(stored, blocks)])
    return weights + passes * tables + BLOCKS_IN_MEMORY * largest


def stored(module: nn.Module) -> int:
    """Bytes of what a checkpoint holds of a module, tensors under two names once."""
    kept = module.state_dict().keys()
    tensors = [tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()] if name in kept]
    return sum(tensor.nbytes for tensor in tensors)
