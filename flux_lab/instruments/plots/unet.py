"""Pictures of a UNet: its shape along its depth beside that of a transformer, and what happens when one of its skips is disturbed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from flux_lab.instruments.plots.pictures import chart
from flux_lab.instruments.style import CYCLE, DPI, FAINT, INK, PAPER, VERMILLION, WIDTH

SHADES = "Blues"
LIGHTEST, DARKEST = 0.2, 0.9  # of SHADES
STEP = 1.07  # between two brackets, on the logarithmic axis
FEW = 30  # stages whose channels are written into their bars


class Stage(NamedTuple):
    """What a layer hands on: its name, channels, and places along one side."""

    name: str
    channels: int
    side: int


def depth_profile(models: Mapping[str, Sequence[Stage]], skips: Mapping[str, Sequence[tuple[int, int]]] | None = None) -> Figure:
    """A panel for each model, one below the other: a bar for every stage, as high as the side of its map, darker with more channels.

    `skips`: model -> (stage that makes it, stage that takes it), drawn as brackets above the bars.
    """
    figure = Figure(figsize=(WIDTH, 2.4 * len(models)), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    widths = [stage.channels for stages in models.values() for stage in stages]
    norm = LogNorm(min(widths), max(max(widths), 2 * min(widths)))
    for axes, (name, stages) in zip(panels, models.items(), strict=True):
        _draw_bars(axes, stages, norm)
        _draw_skips(axes, stages, (skips or {}).get(name, ()))
        axes.set_title(name, fontsize=10.5, color=INK, loc="left")
    return figure


def _draw_bars(axes: Axes, stages: Sequence[Stage], norm: LogNorm) -> None:
    shades = matplotlib.colormaps[SHADES]
    for place, stage in enumerate(stages):
        share = LIGHTEST + (DARKEST - LIGHTEST) * float(norm(stage.channels))
        axes.bar(place, stage.side, 0.85, bottom=0, color=shades(share), edgecolor=FAINT, linewidth=0.5)
        if len(stages) <= FEW or place in (0, len(stages) - 1):
            color = PAPER if share > 0.6 else INK
            axes.text(place, 1.15, f"{stage.channels:,}", rotation=90, ha="center", va="bottom", fontsize=8.5, color=color)
    sides = sorted({stage.side for stage in stages})
    axes.set_yscale("log", base=2)
    axes.set_ylim(1, 1.9 * max(sides))
    axes.yaxis.set_major_locator(FixedLocator(sides))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(sides, [f"{side} × {side}" for side in sides])
    named = range(len(stages)) if len(stages) <= FEW else range(0, len(stages), 4)
    axes.set_xticks(named, [stages[place].name for place in named], rotation=90, fontsize=8)
    axes.set_ylabel("places (logarithmic);\nnumbers: channels")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _draw_skips(axes: Axes, stages: Sequence[Stage], skips: Sequence[tuple[int, int]]) -> None:
    """A bracket for each skip; of those between equal sides the widest is the highest."""
    drawn: dict[int, int] = {}
    for start, end in sorted(skips, key=lambda pair: pair[1] - pair[0]):
        side = stages[start].side
        level = drawn[side] = drawn.get(side, 0) + 1
        height = side * STEP ** (2 * level)
        axes.plot([start, start, end, end], [side, height, height, stages[end].side], color=VERMILLION, linewidth=1.1)


def seam_bars(effects: Mapping[str, Mapping[str, float]], ylabel: str) -> Figure:
    """A group of bars for each named seam, one bar for each named way to disturb it. Raises ValueError when the seams differ."""
    names = list(next(iter(effects.values())))
    if any(list(values) != names for values in effects.values()):
        raise ValueError(f"seam_bars: expected the same seams in every group, got {[list(values) for values in effects.values()]}")
    figure, axes = chart(3.4, ylabel=ylabel)
    thick = 0.8 / len(effects)
    for place, (name, values) in enumerate(effects.items()):
        places = [seam + (place - (len(effects) - 1) / 2) * thick for seam in range(len(names))]
        axes.bar(places, [float(value) for value in values.values()], thick, color=CYCLE[place % len(CYCLE)], label=name)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8.5)
    axes.legend(frameon=False)
    return figure
