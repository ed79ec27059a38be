"""Pictures of speed: ratios of times, gains predicted and measured, and the roofline."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from flux_lab.instruments.plots.pictures import MARKERS, chart
from flux_lab.instruments.style import BLUE, CYCLE, INK, VERMILLION

GIGA = 1e9
Quartiles = tuple[float, float, float]  # median, lower, upper


def ratio_bars(
    cases: Mapping[str, Mapping[str, Quartiles]], xlabel: str = "time, as a share of the reference's (below 1 is faster)"
) -> Figure:
    """A group of bars for every named case, one for each side, with a line from the lower to the upper quartile.

    Raises ValueError for no cases.
    """
    if not cases:
        raise ValueError("cases: expected at least one case")
    sides = list(dict.fromkeys(side for case in cases.values() for side in case))
    figure, axes = chart(0.9 + 0.17 * (len(sides) + 1) * len(cases), xlabel=xlabel)
    thick = 0.82 / len(sides)
    for place, side in enumerate(sides):
        held = [(row, case[side]) for row, case in enumerate(cases.values()) if side in case]
        rows, ratios = [row + (place - (len(sides) - 1) / 2) * thick for row, _ in held], [ratio for _, ratio in held]
        axes.barh(rows, [median for median, _, _ in ratios], thick, color=CYCLE[place % len(CYCLE)], label=side)
        axes.hlines(rows, [low for _, low, _ in ratios], [high for _, _, high in ratios], color=INK, linewidth=1.2)
        for row, (median, _, high) in zip(rows, ratios, strict=True):
            axes.annotate(f"{median:.2f}", (max(median, high), row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=":")
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(sides))
    return figure


def predictions(rows: Mapping[str, tuple[float, Quartiles]], xlabel: str = "time with the trick, as a share of that without") -> Figure:
    """For every trick what was predicted, a hollow diamond, and what was measured, a dot with its quartiles."""
    figure, axes = chart(1.1 + 0.38 * len(rows), xlabel=xlabel)
    places = range(len(rows))
    measured = np.array([quartiles for _, quartiles in rows.values()])
    axes.hlines(places, measured[:, 1], measured[:, 2], color=BLUE, linewidth=2)
    axes.plot(measured[:, 0], places, "o", color=BLUE, markersize=8, label="measured: median and quartiles")
    axes.plot([each for each, _ in rows.values()], places, "D", color=VERMILLION, markersize=9, fillstyle="none", label="predicted")
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=":")
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(y=0.08)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


class Roof(NamedTuple):
    """What a machine can do: FLOPs a second of its products, bytes a second of its memory."""

    flops: float
    bandwidth: float

    def at(self, intensity: float) -> float:
        """The highest rate, FLOPs a second, of work with that many FLOPs for each byte."""
        return min(self.flops, intensity * self.bandwidth)


def roofline(roofs: Mapping[str, Roof], points: Mapping[str, tuple[float, float]], marks: Mapping[str, float] | None = None) -> Figure:
    """Named roofs, and work by its FLOPs for each byte and the rate, FLOPs a second, that it was measured to reach.

    `marks` are named intensities without a measured rate: they stand on the first roof, hollow.
    """
    figure, axes = chart(
        4.6, xlabel="arithmetic intensity (FLOPs for each byte moved)", ylabel="rate (GFLOP/s)", xscale="log", yscale="log"
    )
    places = [intensity for intensity, _ in points.values()] + list((marks or {}).values())
    ridges = [roof.flops / roof.bandwidth for roof in roofs.values()]
    span = np.geomspace(min(*places, *ridges) / 3, max(*places, *ridges) * 3, 200)
    for place, (name, roof) in enumerate(roofs.items()):
        style = {"color": INK, "linestyle": ("-", "--", ":")[place % 3], "linewidth": 1.6}
        axes.plot(span, [roof.at(each) / GIGA for each in span], label=f"roof: {name}", **style)
    for place, (name, (intensity, rate)) in enumerate(points.items()):
        style = {"color": CYCLE[place % len(CYCLE)], "marker": MARKERS[place // len(CYCLE) % len(MARKERS)], "markersize": 8}
        axes.plot(intensity, rate / GIGA, linestyle="", label=name, **style)
    first = next(iter(roofs.values()))
    for place, (name, intensity) in enumerate((marks or {}).items()):
        style = {"color": CYCLE[place % len(CYCLE)], "marker": "P" if place < len(CYCLE) else "X", "markersize": 10, "fillstyle": "none"}
        axes.plot(intensity, first.at(intensity) / GIGA, linestyle="", label=name, **style)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
