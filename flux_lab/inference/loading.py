"""Read a transformer or T5 from its folder one tensor at a time: nothing is in memory that the finished model does not hold.

Modulation weights are read for their table and dropped, weights that are to be quantized are quantized one layer after the other.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flux_lab.checkpoints import COMPONENTS, CheckpointError, Component, check_device, weight_files_of
from flux_lab.config import Config
from flux_lab.inference.hoisting import Conditioning, hoist
from flux_lab.inference.quantization import LOADERS, SCHEMES, check_finite, linear_names, quantize, stored_scheme
from flux_lab.inference.weight_files import WeightFiles

# A table of which few rows are used: on the CPU it stays in the file, and the system reads the pages that are touched.
LOOKED_UP = "shared.weight"

Read = Callable[[Iterable[str]], dict[str, Tensor]]


def load_lean(
    folder: str | Path,
    scheme: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    conditionings: Sequence[Conditioning] = (),
) -> nn.Module:
    """The model of a folder in the diffusers layout, quantized and hoisted on the way. `dtype=None` keeps the file's.

    On the CPU what is neither quantized nor cast is the file itself, mapped into memory. A file that is quantized already is read as it
    is. Raises CheckpointError for a file that does not fit its configuration, or that is quantized by another scheme.
    """
    model, read = open_model(folder, device, dtype, conditionings)
    stored = folder_scheme(folder)
    if scheme is not None and stored is None:
        for name in linear_names(model):
            linear = model.get_submodule(name)
            assign(linear, below(name, read(within(name, linear))))
            check_finite(name, linear)
            model.set_submodule(name, SCHEMES[scheme].from_linear(linear))
    elif scheme not in (None, stored):
        raise CheckpointError(folder, f"weights quantized as {scheme}", stored)
    assign(model, read(name for name, tensor in tensors_of(model).items() if tensor.is_meta))
    return model


def open_model(
    folder: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    conditionings: Sequence[Conditioning] = (),
    mapped: bool = True,
) -> tuple[nn.Module, Read]:
    """The transformer or T5 of a folder on `meta`, quantized as its file is and hoisted if there are conditionings, and a function that
    reads its tensors by their names.

    `mapped`: what is read on the CPU is the file itself; else it is a copy whose memory is used again.
    Raises CheckpointError for another folder or a file that does not fit the configuration, ValueError for a device that is not there.
    """
    check_device(device)
    component, config = read_component(folder)
    model, files = component.empty(config).eval().requires_grad_(False), WeightFiles(component, folder, dtype)
    if stored := folder_scheme(folder):
        model = quantize(model, stored)
    from_disk = files.read if mapped else files.copy
    for name, tensor in tensors_of(model).items():
        found = tuple(files.empty(name).shape) if name in files else "nothing"
        if found != tuple(tensor.shape):
            raise CheckpointError(folder, f"shape {tuple(tensor.shape)}", found, key=name)
        assign(model, {name: files.empty(name)})

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        looked_up = {name: files[name].to(device) for name in names if name == LOOKED_UP}
        return from_disk([name for name in names if name != LOOKED_UP], device) | looked_up

    if conditionings:
        model = hoist(model, conditionings, fetch=lambda name, module: below(name, read(within(name, module))))
    return model, read


def folder_scheme(folder: str | Path) -> str | None:
    """How the files of a transformer or T5 are quantized. Raises CheckpointError for another folder."""
    component, _ = read_component(folder)
    return next(filter(None, map(stored_scheme, weight_files_of(component, Path(folder)))), None)


def read_component(folder: str | Path) -> tuple[Component, Config]:
    """Whether a folder holds a transformer or T5, and its configuration. Raises CheckpointError for another folder."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise CheckpointError(folder, "config.json and safetensors files of a transformer or T5", "no such files")
    values = json.loads(file.read_text(encoding="utf-8"))
    given = [values.get("_class_name"), *(values.get("architectures") or [])]
    known = [COMPONENTS[part] for part in LOADERS]
    component = next((each for each in known if each.model.__name__ in given), None)
    if component is None:
        raise CheckpointError(file, f"one of {[each.model.__name__ for each in known]}", given)
    return component, component.config.from_dict(values)


# -------------------------------------------------------------------------------------------------- tensors of a model, by name


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: parameters and buffers, those under two names once, without tables made for one run."""
    kept = model.state_dict().keys()
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name in kept}


def assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make `tensors` the parameters and buffers of those names."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor


def within(name: str, module: nn.Module) -> list[str]:
    """The names of a module's tensors in the model that has the module as `name`."""
    return [f"{name}.{key}" for key in module.state_dict()]


def below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by their names in the module `name`."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
