"""Pictures of the denoising loop: curves over its steps, one number for each seed, and the velocity as a map."""

from collections.abc import Mapping, Sequence

import torch
from einops import reduce
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flux_lab.instruments.plots.pictures import MARKERS, chart, legend_above
from flux_lab.instruments.style import CYCLE, INK
from flux_lab.latents import unpack_latents
from flux_lab.shapes import shaped

AMOUNTS = "viridis"  # for values from zero up
SPREAD = 0.3  # of the dots of one group, as a share of the distance to the next


def lines(x: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, from_zero: bool = True) -> Figure:
    """Named curves over one axis. `from_zero` lets the vertical axis begin at 0. Raises ValueError for a curve of another length."""
    for name, values in curves.items():
        if len(values) != len(x):
            raise ValueError(f"lines: expected {len(x)} values, one for each of x, got {len(values)} for {name!r}")
    figure, axes = chart(3.2, xlabel=xlabel, ylabel=ylabel)
    for place, (name, values) in enumerate(curves.items()):
        color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        axes.plot(x, [float(value) for value in values], color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
    if from_zero:
        axes.set_ylim(bottom=0)
    legend_above(axes)
    return figure


def seed_dots(groups: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
    """A row for every named group: a dot for each seed, in the seeds' order from top to bottom, and a line at their mean."""
    figure, axes = chart(0.9 + 0.55 * len(groups), xlabel=xlabel)
    for row, (name, values) in enumerate(groups.items()):
        values = torch.as_tensor(values, dtype=torch.float64)
        places = row + torch.linspace(-SPREAD, SPREAD, len(values)) * (len(values) > 1)
        color, marker = CYCLE[row % len(CYCLE)], MARKERS[row % len(MARKERS)]
        axes.plot(values.tolist(), places.tolist(), color=color, marker=marker, linestyle="", markersize=6, label=name)
        axes.plot([values.mean().item()] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=2)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    return figure


@shaped
def strength_map(
    tokens: Float[Tensor, "batch tokens patch_channels"], height: int, width: int, highest: float | None = None
) -> Image.Image:
    """How strong the first packed latents or velocities are at every place: the root mean square over the channels, dark to light.

    The map has `height` x `width` pixels, those of the image. `highest` is the strength that becomes the lightest, by default the largest.
    """
    strength = reduce(unpack_latents(tokens[:1], height, width).square(), "1 channels rows columns -> rows columns", "mean").sqrt()
    share = (strength / (strength.max() if highest is None else highest)).clamp(0, 1)
    colors = (colormaps[AMOUNTS](share.numpy(force=True))[..., :3] * 255).round().astype("uint8")
    return Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST)
