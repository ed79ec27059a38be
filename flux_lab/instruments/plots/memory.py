"""Pictures of memory and of rounding: levels of a code book, bytes over time, what a reading and a computing thread did when."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flux_lab.instruments.plots.pictures import chart
from flux_lab.instruments.style import BLUE, CYCLE, DPI, FAINT, INK, PALE, PAPER, WIDTH

BINS = 81
MEGA = 1e6
MILLI = 1e3
HALF = 0.36  # of the height of a row


def code_books(numbers: Float[Tensor, "numbers"], books: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
    """A panel for each named code book: a histogram of `numbers`, and below it a tick for each level.

    Numbers and levels are in units of the scale, so from -1 to 1. Raises ValueError for a book without levels.
    """
    if not books or not all(len(levels) for levels in books.values()):
        raise ValueError("books: expected at least one, each with at least one level")
    figure = Figure(figsize=(WIDTH, 0.6 + 1.6 * len(books)), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(len(books), 1, sharex=True, squeeze=False)[:, 0]
    density, edges = np.histogram(numbers.detach().float().cpu().numpy(), bins=BINS, range=(-1, 1), density=True)
    for place, (axes, (name, levels)) in enumerate(zip(panels, books.items(), strict=True)):
        axes.bar((edges[:-1] + edges[1:]) / 2, density, edges[1] - edges[0], color=FAINT)
        depth = 0.3 * density.max()
        axes.vlines(list(levels), -depth, 0, color=CYCLE[place % len(CYCLE)], linewidth=1.4 if len(levels) < BINS else 0.6)
        axes.set_title(f"{name}: {len(levels)} levels", fontsize=9.5, loc="left", color=INK)
        axes.set_ylim(-depth, None)
        axes.set_ylabel("density", fontsize=9)
        _plain(axes)
    panels[-1].set_xlabel(xlabel)
    return figure


def bytes_over_time(history: Sequence[tuple[float, int]], spans: Mapping[str, tuple[float, float]], ylabel: str = "megabytes") -> Figure:
    """Bytes that are alive over seconds, as stairs, and named spans of time behind them, each with its own peak.

    Raises ValueError when a span holds no point of the history.
    """
    times, alive = (np.array(column) for column in zip(*history, strict=True))
    figure, axes = chart(3.6, xlabel="seconds", ylabel=ylabel)
    axes.fill_between(times, alive / MEGA, step="post", color=BLUE, alpha=0.25, linewidth=0)
    axes.step(times, alive / MEGA, where="post", color=BLUE, linewidth=1.3)
    top = alive.max() / MEGA
    for place, (name, (start, stop)) in enumerate(spans.items()):
        inside = (times >= start) & (times <= stop)
        if not inside.any():
            raise ValueError(f"spans: expected points of the history in each, got none in {name!r} ({start:.3f} to {stop:.3f} s)")
        axes.axvspan(start, stop, color=PALE if place % 2 else "#dde8ef", zorder=0)
        text = f"{name}\npeak {alive[inside].max() / MEGA:.1f} MB"
        # The outer ones may be short: their text begins and ends with the picture.
        side = "left" if place == 0 else "right" if place == len(spans) - 1 else "center"
        at = {"left": start, "right": stop, "center": (start + stop) / 2}[side]
        axes.text(at, 1.04 * top, text, ha=side, va="bottom", fontsize=8.5, color=INK)
    axes.set_xlim(min(start for start, _ in spans.values()), max(stop for _, stop in spans.values()))
    axes.set_ylim(0, 1.25 * top)
    return figure


def threads(
    rows: Mapping[str, Sequence[tuple[str, float, float]]], colors: Mapping[str, str], resident: Sequence[tuple[float, int]]
) -> Figure:
    """What each named thread did from when to when, as (what, start, stop) in seconds, and below it bytes over the same time.

    `colors` gives every kind of work its colour. Time is drawn in milliseconds.
    """
    figure = Figure(figsize=(WIDTH, 2.6 + 0.5 * len(rows)), dpi=DPI, facecolor=PAPER, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[0.5 * len(rows), 1.5])
    for place, events in enumerate(rows.values()):
        for what in colors:
            spans = [(MILLI * start, MILLI * (stop - start)) for kind, start, stop in events if kind == what]
            above.broken_barh(spans, (place - HALF, 2 * HALF), color=colors[what], edgecolor=PAPER, linewidth=0.3)
    above.set_yticks(range(len(rows)), rows)
    above.invert_yaxis()
    handles = [above.barh(0, 0, color=color, label=what) for what, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    times, alive = (np.array(column) for column in zip(*resident, strict=True))
    below.step(MILLI * times, alive / MEGA, where="post", color=BLUE, linewidth=1.3)
    below.fill_between(MILLI * times, alive / MEGA, step="post", color=BLUE, alpha=0.25, linewidth=0)
    below.set_ylim(bottom=0)
    below.set_xlabel("milliseconds")
    below.set_ylabel("megabytes of\nstreamed weights", fontsize=9)
    for axes in (above, below):
        _plain(axes)
    return figure


def block_grid(matrix: Float[Tensor, "rows columns"], blocks: Mapping[str, tuple[int, int]], label: str) -> Figure:
    """The absolute values of a matrix, once for each named size (rows, columns) of the blocks that share a scale, drawn as lines."""
    values = matrix.detach().abs().float().cpu().numpy()
    tall = 0.8 * WIDTH * len(values) / values.shape[1]
    figure = Figure(figsize=(WIDTH, 0.5 + (0.3 + tall) * len(blocks)), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(len(blocks), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, (height, width)) in zip(panels, blocks.items(), strict=True):
        drawn = axes.imshow(values, cmap="cividis", vmin=0, vmax=values.max(), interpolation="nearest")
        style = {"color": PAPER, "linewidth": 0.9}
        axes.hlines(np.arange(height, len(values), height) - 0.5, -0.5, values.shape[1] - 0.5, **style)
        axes.vlines(np.arange(width, values.shape[1], width) - 0.5, -0.5, len(values) - 0.5, **style)
        axes.set_title(name, fontsize=9.5, color=INK)
        axes.set_ylabel("output\nchannel", fontsize=8.5)
    panels[-1].set_xlabel("input channel", fontsize=8.5)
    figure.colorbar(drawn, ax=panels.tolist(), label=label, shrink=0.85, aspect=15)
    return figure


def channel_peaks(peaks: Float[Tensor, "channels"], threshold: float, ylabel: str) -> Figure:
    """A bar for each channel, those that reach `threshold` in the second colour, and the threshold as a line."""
    values = peaks.detach().float().cpu().numpy()
    figure, axes = chart(3.2, xlabel="input channel", ylabel=ylabel)
    for color, chosen, name in ((CYCLE[0], values < threshold, "below"), (CYCLE[1], values >= threshold, "outliers")):
        axes.bar(np.flatnonzero(chosen), values[chosen], 0.9, color=color, label=f"{name}: {chosen.sum()} of {len(values)}")
    axes.axhline(threshold, color=INK, linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def rounding_stairs(books: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> Figure:
    """What a number becomes when it is rounded to the nearest level of each named code book."""
    figure, axes = chart(3.4, xlabel=xlabel, ylabel=ylabel)
    axes.plot([-1, 1], [-1, 1], color=FAINT, linewidth=1, label="not rounded")
    for place, (name, levels) in enumerate(books.items()):
        ordered = sorted(levels)
        edges = [-1.0, *((low + high) / 2 for low, high in pairwise(ordered)), 1.0]
        axes.stairs(ordered, edges, color=CYCLE[place % len(CYCLE)], linewidth=1.4, baseline=None, label=name)
    axes.legend(frameon=False)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
