"""A transformer of random numbers on disk, of any size: written layer by layer, so the machine need not hold it."""

import functools
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flux_lab.checkpoints import TRANSFORMER, empty_weights
from flux_lab.config import FluxTransformer2DConfig
from flux_lab.files import replacing
from flux_lab.inference.int8 import LARGEST, Linear8bit
from flux_lab.inference.loading import tensors_of
from flux_lab.inference.nf4 import NF4_CODE, LinearNF4
from flux_lab.inference.quantization import METADATA_KEY, check_free_disk, quantize
from flux_lab.transformer import FluxTransformer2DModel

STD = 0.02
# How many different normal numbers there are, and the largest, a little rounded up.
NUMBERS, LARGEST_NUMBER = 2**16, 4.4 * STD
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}


def write_random(folder: Path, config: FluxTransformer2DConfig, scheme: str | None) -> Path:
    """A transformer in bf16, or quantized, written layer by layer in the order in which it is used; no two layers are in memory."""
    model = on_meta(config, scheme)
    tensors = tensors_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    check_free_disk(folder, sum(tensor.nbytes for tensor in tensors.values()))
    file = folder / f"{TRANSFORMER.weights}.safetensors"
    with replacing(file) as new, replacing(folder / "config.json") as new_config:
        new_config.write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
        with new.open("wb") as stream:
            stream.write(_header(tensors, scheme))
            for name, tensor in _random(model):
                assert (tensors[name].shape, tensors[name].dtype) == (tensor.shape, tensor.dtype), name
                stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
            os.fsync(stream.fileno())
    return file


def on_meta(config: FluxTransformer2DConfig, scheme: str | None) -> nn.Module:
    """The transformer in bf16, or quantized, without numbers."""
    with empty_weights():
        model = FluxTransformer2DModel(config).to(torch.bfloat16)
    return quantize(model, scheme) if scheme else model


def _header(tensors: dict[str, Tensor], scheme: str | None) -> bytes:
    """The start of a safetensors file that holds `tensors` one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({METADATA_KEY: scheme} if scheme else {})}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _random(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and numbers of every tensor, in the order of `tensors_of`: parameters first, then the codes and scales of quantized layers."""
    generator = np.random.Generator(np.random.SFC64(0))
    for name, parameter in model.named_parameters():
        yield name, _draw(generator, parameter.shape, _normal(parameter.dtype))
    for name, layer in model.named_modules():
        if isinstance(layer, Linear8bit):
            codes = (_normal(torch.float64) * (LARGEST / LARGEST_NUMBER)).round().to(torch.int8)
            yield f"{name}.weight", _draw(generator, layer.weight.shape, codes)
            yield f"{name}.absmax", torch.full(layer.absmax.shape, LARGEST_NUMBER)
        elif isinstance(layer, LinearNF4):
            # Of normal numbers each level gets about as many: so do random bytes. All scales are the offset.
            yield f"{name}.weight", torch.from_numpy(generator.integers(0, 256, layer.weight.shape, dtype=np.uint8))
            yield f"{name}.absmax", torch.zeros(layer.absmax.shape, dtype=torch.uint8)
            yield f"{name}.nested_absmax", torch.zeros(layer.nested_absmax.shape)
            yield f"{name}.offset", STD / torch.tensor(NF4_CODE).square().mean().sqrt()


@functools.cache
def _normal(dtype: torch.dtype) -> Tensor:
    """65,536 numbers that split the normal distribution into equal parts: one of them at random is a normal number, to 16 bits."""
    shares = (torch.arange(NUMBERS, dtype=torch.float64) + 0.5) / NUMBERS
    return (torch.special.ndtri(shares) * STD).to(dtype)


def _draw(generator: np.random.Generator, shape: torch.Size, numbers: Tensor) -> Tensor:
    """Numbers out of `numbers`. Looking them up is five times faster than computing normal numbers."""
    indices = generator.integers(0, NUMBERS, math.prod(shape), dtype=np.uint16)
    whole = {1: np.uint8, 2: np.uint16, 4: np.uint32}[numbers.itemsize]
    bits = numbers.view(torch.uint8).numpy().view(whole).take(indices)
    return torch.from_numpy(bits.view(np.uint8)).view(numbers.dtype).view(shape)
