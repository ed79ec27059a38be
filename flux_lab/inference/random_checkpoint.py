"""A transformer of random numbers on disk, of any size: written layer by layer, so the machine need not hold it."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux_lab.checkpoints import TRANSFORMER
from flux_lab.config import FluxTransformer2DConfig
from flux_lab.inference.loading import tensors_of
from flux_lab.inference.quantization import METADATA_KEY, check_free_disk, quantize, replacing
from flux_lab.inference.quantized_linear import QuantizedLinear
from flux_lab.transformer import FluxTransformer2DModel

STD = 0.02
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
    with torch.device("meta"):
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
    for name, parameter in model.named_parameters():
        yield name, torch.randn(parameter.shape).mul_(STD).to(parameter.dtype)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)
            nn.init.normal_(linear.weight, std=STD)
            yield from ((f"{name}.{key}", tensor) for key, tensor in type(layer).from_linear(linear).named_buffers())
