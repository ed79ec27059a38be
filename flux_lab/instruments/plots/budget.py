"""Pictures of what a model costs: parameters, FLOPs and memory by part."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from flux_lab.instruments.plots.pictures import MARKERS, chart
from flux_lab.instruments.style import CYCLE, DPI, INK, PAPER, WIDTH

NARROWEST = 0.045  # of the axis: a narrower part has no room for its number
DARK = 0.55  # luminance below which white can be read
LUMINANCE = (0.299, 0.587, 0.114)
STRENGTHS = (1.0, 0.5, 0.25)


def part_colors(parts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """A colour for every part. Parts that are alike, "double: MLP" and "single: MLP", share one, the second paler; when all colours are
    used up, paler ones follow."""
    kinds, before = list(dict.fromkeys(map(kind_of, parts))), Counter()
    colors = {}
    for part in parts:
        place = kinds.index(kind_of(part))
        strength = STRENGTHS[min(place // len(CYCLE) + before[kind_of(part)], len(STRENGTHS) - 1)]
        colors[part] = tuple(1 - strength * (1 - value) for value in to_rgb(CYCLE[place % len(CYCLE)]))
        before[kind_of(part)] += 1
    return colors


def kind_of(part: str) -> str:
    return part.split(": ")[-1]


def stacked_bars(
    rows: Mapping[str, Mapping[str, float]], xlabel: str, share: bool = False, marks: Mapping[str, float] | None = None
) -> Figure:
    """One bar for each named row, made of its parts. `share`: every bar as percent of its own sum.

    `marks` are named vertical lines. Parts that a row does not have take no room. Raises ValueError for no rows or a row without a sum.
    """
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    if not rows or not all(totals.values()):
        raise ValueError(f"rows: expected at least one row, each with a part above zero, got the sums {totals}")
    figure = Figure(figsize=(WIDTH, 1.35 + 0.5 * len(rows)), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel)
    axes.spines[["top", "right", "left"]].set_visible(False)
    scale = {name: 100 / total if share else 1 for name, total in totals.items()}
    longest = max(totals[name] * scale[name] for name in rows)
    colors = part_colors(list(dict.fromkeys(part for parts in rows.values() for part in parts)))
    for place, (name, parts) in enumerate(rows.items()):
        left = 0.0
        for part, value in parts.items():
            width = value * scale[name]
            axes.barh(place, width, 0.72, left=left, color=colors[part], edgecolor=PAPER, linewidth=0.8)
            if width > NARROWEST * longest:
                _write(axes, left + width / 2, place, f"{width:.0f} %" if share else f"{width:.3g}", colors[part])
            left += width
    for name, value in (marks or {}).items():
        axes.axvline(value, color=INK, linestyle=":", linewidth=1.3)
        axes.annotate(
            name, (value, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points", fontsize=9, va="top"
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.9 if marks else -0.5)
    handles = [axes.barh(0, 0, color=color, label=part) for part, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), frameon=False, fontsize=9)
    return figure


def _write(axes: Axes, x: float, y: float, text: str, on: tuple[float, ...]) -> None:
    dark = float(np.dot(on, LUMINANCE)) < DARK
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=PAPER if dark else INK)


def growth(curves: Mapping[str, Mapping[int, float]], xlabel: str, ylabel: str) -> Figure:
    """Named curves over a size, on plain axes with a point at every size."""
    figure, axes = chart(3.4, xlabel=xlabel, ylabel=ylabel)
    for place, (name, curve) in enumerate(curves.items()):
        style = {"color": CYCLE[place % len(CYCLE)], "marker": MARKERS[place % len(MARKERS)], "markersize": 5, "linewidth": 1.6}
        axes.plot(list(curve), list(curve.values()), label=name, **style)
    axes.set_xticks(sorted({size for curve in curves.values() for size in curve}))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
