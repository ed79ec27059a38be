"""Pictures of attention: who looks at whom, block by block, and at which places of the picture a word is looked at."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flux_lab.instruments.style import CYCLE, DPI, INK, PAPER, VERMILLION, WIDTH
from flux_lab.shapes import shaped

HEAT = "inferno"
DARKENED = 0.45  # how much of the picture shows through a map that lies on it
KINDS = ("text", "image")


@shaped
def attention_matrix(probabilities: Float[Tensor, "heads sequence keys"], length: int) -> Figure:
    """One panel a head: a row for each token that asks, a column for each that is asked, the first `length` of them text.

    The colour grows with the square root of the probability, so that small ones are seen.
    """
    count, heads = len(probabilities[0]), len(probabilities)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.93 * WIDTH / heads), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = list(figure.subplots(1, heads, squeeze=False).flat)
    norm = PowerNorm(0.5, vmin=0, vmax=float(probabilities.max()))
    for head, axes in enumerate(panels):
        drawn = axes.imshow(_numbers(probabilities[head]), cmap=HEAT, norm=norm, interpolation="nearest")
        axes.axhline(length - 0.5, color="white", linewidth=1)
        axes.axvline(length - 0.5, color="white", linewidth=1)
        middles = [(length - 1) / 2, (length + count - 1) / 2]
        axes.set_xticks(middles, KINDS)
        axes.set_yticks(middles, KINDS, rotation=90, va="center")
        axes.tick_params(length=0)
        axes.set_title(f"head {head}", fontsize=10, color=INK)
        axes.set_xlabel("asked (key)")
    panels[0].set_ylabel("asks (query)")
    figure.colorbar(drawn, ax=panels, location="bottom", label="share of the query's attention", shrink=0.5, aspect=40)
    return figure


def word_maps(image: Image.Image, maps: Mapping[str, Float[Tensor, "rows columns"]], across: int = 6) -> Figure:
    """The picture itself, then every map on top of it, each on a scale of its own from 0 to its largest value.

    The largest value stands in the title, in percent; a square marks its place.
    """
    count = 1 + len(maps)
    across = min(across, count)
    down = -(-count // across)
    cell = min(2.6, WIDTH / across)
    figure = Figure(figsize=(across * cell, down * (cell + 0.36)), dpi=DPI, facecolor=PAPER, layout="constrained")
    plain, *panels = figure.subplots(down, across, squeeze=False).flat
    plain.imshow(image)
    plain.set_title("the picture", fontsize=8.5, color=INK, pad=3)
    for axes in (plain, *panels):
        axes.set_axis_off()
    for axes, (name, values) in zip(panels, maps.items(), strict=False):
        _overlay(axes, image, _numbers(values))
        axes.set_title(f"{name}\nlargest {100 * float(values.max()):.2g} %", fontsize=8.5, color=INK, pad=3)
    return figure


def attention_shares(shares: Mapping[str, Sequence[float] | Tensor], names: Sequence[str]) -> Figure:
    """For every named block a bar of 100 %: how one kind of query divides its attention among kinds of token."""
    figure = Figure(figsize=(WIDTH, 3.2), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(xlabel="block", ylabel="share of attention (%)")
    bottom = np.zeros(len(names))
    for place, (name, values) in enumerate(shares.items()):
        heights = 100 * np.asarray([float(value) for value in values])
        axes.bar(range(len(names)), heights, 0.85, bottom=bottom, label=name, color=CYCLE[place % len(CYCLE)])
        bottom += heights
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(shares))
    return figure


def _overlay(axes: Axes, image: Image.Image, values: np.ndarray) -> None:
    """A map on a picture in gray, with a square around its largest value."""
    height, width = image.height, image.width
    gray = np.asarray(image.convert("L").convert("RGB"))
    extent = (0, width, height, 0)
    axes.imshow(gray, extent=extent)
    axes.imshow(values, cmap=HEAT, vmin=0, vmax=float(values.max()) or 1.0, alpha=1 - DARKENED, extent=extent, interpolation="nearest")
    row, column = np.unravel_index(values.argmax(), values.shape)
    high, wide = height / values.shape[0], width / values.shape[1]
    left, top = column * wide, row * high
    axes.plot([left, left + wide, left + wide, left, left], [top, top, top + high, top + high, top], color=VERMILLION, linewidth=1.5)


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
