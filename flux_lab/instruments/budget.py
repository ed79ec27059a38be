"""Where the parameters are: counted on the `meta` device, where a model of any size takes no memory and no time."""

from collections.abc import Callable
from typing import Any

from torch import nn

from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import empty_weights
from flux_lab.clip import CLIPTextModel
from flux_lab.instruments.anatomy import FLUX_1_DEV, MINIATURE, Anatomy
from flux_lab.instruments.table import Table
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
}


def on_meta(part: str, anatomy: Anatomy) -> nn.Module:
    """One part of a pipeline as an empty model: every shape is there, no number is. Raises ValueError for an unknown part."""
    if part not in MODELS:
        raise ValueError(f"part: expected one of {list(MODELS)}, got {part!r}")
    with empty_weights():
        return MODELS[part](getattr(anatomy, part)).eval().requires_grad_(False)


def parameter_counts(anatomy: Anatomy) -> dict[str, int]:
    """Part -> number of its parameters, in the order in which the data flows."""
    return {part: sum(parameter.numel() for parameter in on_meta(part, anatomy).parameters()) for part in MODELS}


def budget(*anatomies: Anatomy) -> Table:
    """The parameters of every part and of the whole, by default of the miniature and of FLUX.1-dev.

    The last column says how many times as many the last model has as the first.
    """
    anatomies = anatomies or (MINIATURE, FLUX_1_DEV)
    counts = [parameter_counts(anatomy) for anatomy in anatomies]
    rows = [[f"`{part}`", *(count[part] for count in counts)] for part in MODELS]
    rows.append(["all", *(sum(count.values()) for count in counts)])
    header = ["parameters of", *(anatomy.name for anatomy in anatomies)]
    if len(anatomies) > 1:
        header.append("ratio")
        rows = [[*row, round(row[-1] / row[1])] for row in rows]
    return Table(header, rows)
