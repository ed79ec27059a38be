"""Quantize a model: put Linear8bit or LinearNF4 in the place of its linear layers, write it to a file, read it again.

Of FLUX.1 only T5 and the transformer are quantized: they hold 98 % of the numbers. Norms and embeddings stay as they are, and so does
T5's `wo`, whose results are the largest numbers of the whole model.
"""

import errno
import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import (
    COMPONENTS,
    CheckpointError,
    Component,
    check_device,
    component_of,
    empty_weights,
    load_t5,
    load_transformer,
    local_folder,
    read_model_index,
    write_model,
)
from flux_lab.clip import CLIPTextModel
from flux_lab.files import replacing
from flux_lab.inference.int8 import Linear8bit
from flux_lab.inference.nf4 import LinearNF4
from flux_lab.inference.quantized_linear import QuantizedLinear

SCHEMES: dict[str, type[QuantizedLinear]] = {"int8": Linear8bit, "nf4": LinearNF4}
BACKENDS = ("flux_lab", "bitsandbytes")
# Parts of a pipeline that are worth quantizing, and who reads them.
LOADERS = {"transformer": load_transformer, "text_encoder_2": load_t5}
# By name, in every dtype: the layer whose results are too large for fp16.
KEPT = ("wo",)
METADATA_KEY = "quantization"


def quantize(model: nn.Module, scheme: str, device: torch.device | str | None = None, backend: str = "flux_lab") -> nn.Module:
    """Swap every nn.Linear of `model` but T5's `wo`, in place and one after the other, and return the model.

    `scheme` is "int8" or "nf4". With `device` each layer moves there before it is quantized, and the rest of the model at the end, so
    that the device never holds more than the quantized model and one layer. With backend="bitsandbytes" that package's layers, whose
    GPU kernels are faster, take their place. Raises ValueError for an unknown scheme, a device that is not there, a model that stays
    as it is, or weights that are not finite; ImportError when the backend is missing.
    """
    make = _maker(scheme, backend)
    if device is not None:
        check_device(device)
    if isinstance(model, AutoencoderKL | CLIPTextModel):
        raise ValueError(f"model: {type(model).__name__} stays as it is: it is small, and nothing after it evens out its errors")
    names = linear_names(model)
    if not names:
        raise ValueError(f"model: {type(model).__name__} has no nn.Linear to quantize, or is quantized already")
    for name in names:
        linear = model.get_submodule(name)
        check_finite(name, linear)
        model.set_submodule(name, make(linear if device is None else _alias(linear).to(device)))
    return model if device is None else model.to(device)


def linear_names(model: nn.Module) -> list[str]:
    """The layers that `quantize` swaps."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and not set(name.split(".")) & set(KEPT)]


def scheme_of(model: nn.Module) -> str | None:
    """How a model is quantized, "int8" or "nf4"; None for one that is not."""
    found = {scheme for scheme, kind in SCHEMES.items() if any(isinstance(module, kind) for module in model.modules())}
    return next(iter(found), None)


def _maker(scheme: str, backend: str) -> Callable[[nn.Linear], nn.Module]:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {list(SCHEMES)}, got {scheme!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {list(BACKENDS)}, got {backend!r}")
    if backend == "flux_lab":
        return SCHEMES[scheme].from_linear
    from flux_lab.inference.bitsandbytes_layers import from_linear

    return partial(from_linear, scheme=scheme)


def _alias(linear: nn.Linear) -> nn.Linear:
    """A layer of its own with the same tensors: when it moves to a device, the model's does not."""
    with empty_weights():
        alias = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    alias.load_state_dict(linear.state_dict(), assign=True)
    return alias


def check_finite(name: str, linear: nn.Linear) -> None:
    """Raises ValueError, naming the layer, when some of its weights are infinite or not a number."""
    if not linear.weight.is_meta and not linear.weight.isfinite().all():
        raise ValueError(f"{name}.weight: expected finite numbers, got some that are infinite or not a number")


# ------------------------------------------------------------------------------------------------------------------- on disk


def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Write `config.json` and one safetensors file, whose metadata names the scheme. Returns the file.

    Raises TypeError for a model that is neither a transformer nor T5, ValueError for one that is not quantized by us, not all of it by
    one scheme, or hoisted; OSError when the disk is full.
    """
    component, scheme = component_of(model, {part: COMPONENTS[part] for part in LOADERS}), scheme_of(model)
    if scheme is None:
        raise ValueError(f"model: expected one after quantize(model, scheme), got {type(model).__name__}, not quantized")
    check_free_disk(Path(folder), sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers())))
    return write_model(component, model, folder, quantize(component.empty(model.config), scheme), {METADATA_KEY: scheme})


def load_quantized(folder: str | Path, scheme: str | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Read what `save_quantized` wrote. On the CPU the weights are the file itself, mapped into memory.

    Raises CheckpointError when the file is not quantized, or not as `scheme`, or a tensor of it does not fit; ValueError for a device
    that is not there.
    """
    check_device(device)
    folder = Path(folder)
    component = _component_in(folder)
    file = folder / f"{component.weights}.safetensors"
    found = stored_scheme(file)
    if found is None or (scheme or found) != found:
        raise CheckpointError(file, f"weights quantized as {scheme or ' or '.join(SCHEMES)}", found or "weights that are not quantized")
    model = component.empty(component.config.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    quantize(model, found)
    tensors = load_file(file, device=str(device))
    tensors |= {name: tensors[source] for name, source in component.tied.items() if source in tensors}
    _check_fit(file, {name: (tuple(tensor.shape)) for name, tensor in tensors.items()}, model)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def stored_scheme(file: str | Path) -> str | None:
    """How the weights of a safetensors file are quantized: None if they are not. Reads the header only; raises CheckpointError."""
    try:
        with safe_open(file, framework="pt") as handle:
            found = (handle.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(file, "a whole safetensors file", f"something else ({error})") from error
    if found not in (None, *SCHEMES):
        raise CheckpointError(file, f"weights quantized as {' or '.join(SCHEMES)}", found, key=METADATA_KEY)
    return found


def quantize_checkpoint(path: str | Path, folder: str | Path, scheme: str, dtype: torch.dtype | None = None) -> None:
    """Make a whole pipeline's folder with T5 and the transformer quantized; everything else is copied.

    The new folder takes its name when all of it is there. Raises ValueError when there is such a folder already.
    """
    source, folder = local_folder(path), Path(folder)
    read_model_index(source)
    _maker(scheme, "flux_lab")
    if folder.exists():
        raise ValueError(f"folder: expected a name that is not taken, got {str(folder)!r}")
    with replacing(folder) as new:
        shutil.copytree(source, new, ignore=shutil.ignore_patterns(*LOADERS))
        for part, load in LOADERS.items():
            save_quantized(quantize(load(source / part, dtype), scheme), new / part)


def check_free_disk(folder: Path, needed: int) -> None:
    """Raises OSError when `folder` has no room for `needed` bytes, before any is written."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"expected {needed / 1e9:.1f} GB of free disk, found {free / 1e9:.1f} GB", str(folder))


def _component_in(folder: Path) -> Component:
    for part in LOADERS:
        if (folder / f"{COMPONENTS[part].weights}.safetensors").is_file() and (folder / "config.json").is_file():
            return COMPONENTS[part]
    raise CheckpointError(folder, "config.json and the weights of a quantized transformer or T5", "no such files")


def _check_fit(file: Path, shapes: dict[str, tuple[int, ...]], model: nn.Module) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise CheckpointError(file, f"shape {expected.get(name, 'of nothing')}", shapes.get(name, "nothing"), key=name)
