"""Pictures of what happens between ids and vectors: maps with named rows and columns, the position bias, curves."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Num
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flux_lab.instruments.plots.pictures import MARKERS, chart
from flux_lab.instruments.plots.text import drawable
from flux_lab.instruments.style import CYCLE, DPI, INK, PAPER, SIGNED, WIDTH
from flux_lab.shapes import shaped

CELL = 0.36  # inches of a cell with a number in it, high
STYLES = ("-", "--", "-.", ":")


@shaped
def labelled_map(
    values: Float[Tensor, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    ylabel: str,
    label: str,
    digits: int | None = None,
    signed: bool = False,
) -> Figure:
    """A heat map with a name for every row and column; with `digits` each cell has its number. `label` says what the colours mean.

    `signed` is for values on both sides of zero. Raises ValueError when names and values differ in number.
    """
    if (len(rows), len(columns)) != tuple(values.shape):
        raise ValueError(f"expected a name for each of {list(values.shape)} rows and columns, got {len(rows)} and {len(columns)} names")
    numbers = values.float().cpu().numpy()
    height = 1.5 + CELL * len(rows)
    figure = Figure(figsize=(min(WIDTH, 3.2 + 0.62 * len(columns)), height), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    limit = float(abs(numbers).max()) or 1.0
    drawn = axes.imshow(numbers, cmap=SIGNED if signed else "Blues", vmin=-limit if signed else 0, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)), [drawable(name) for name in columns], rotation=45, ha="right", fontsize=9, parse_math=False)
    axes.set_yticks(range(len(rows)), [drawable(name) for name in rows], fontsize=9, parse_math=False)
    if digits is not None:
        for (row, column), value in np.ndenumerate(numbers):
            color = PAPER if abs(value) > 0.6 * limit else INK
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.9, aspect=18)
    return figure


@shaped
def position_bias(bias: Float[Tensor, "1 heads query key"]) -> Figure:
    """What is added to the score of every query and key, one map for each head, all on one scale around zero."""
    maps = bias[0].float().cpu().numpy()
    across = min(len(maps), 4)
    down = -(-len(maps) // across)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.6 * down), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    limit = float(abs(maps).max()) or 1.0
    for head, axes in enumerate(panels.flat):
        if head >= len(maps):
            axes.set_axis_off()
            continue
        drawn = axes.imshow(maps[head], cmap=SIGNED, vmin=-limit, vmax=limit)
        axes.set_title(f"head {head}", fontsize=9.5, color=INK, pad=3)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("key: place of the token that is looked at", fontsize=10)
    figure.supylabel("query: place of the\ntoken that looks", fontsize=10)
    figure.colorbar(drawn, ax=panels, label="added to the score", shrink=0.9, aspect=18)
    return figure


@shaped
def curves(x: Num[Tensor, "points"], lines: Mapping[str, Num[Tensor, "points"]], xlabel: str, ylabel: str, step: bool = False) -> Figure:
    """One named curve each over the same `x`. `step` draws stairs with a marker at every point, for values at whole numbers only."""
    figure, axes = chart(3.4, xlabel=xlabel, ylabel=ylabel)
    for place, (name, y) in enumerate(lines.items()):
        style = {"color": CYCLE[place % len(CYCLE)], "linestyle": STYLES[place % len(STYLES)], "linewidth": 1.8, "label": name}
        if step:
            style |= {"drawstyle": "steps-mid", "marker": MARKERS[place % len(MARKERS)], "markersize": 3}
        axes.plot(x.cpu().numpy(), y.float().cpu().numpy(), **style)
    if len(lines) > 1:
        axes.legend(frameon=False)
    return figure
