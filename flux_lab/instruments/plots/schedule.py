"""Pictures of noise levels: paths from noise to picture, the shift, schedules, and what a number of steps costs in error."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter
from torch import Tensor

from flux_lab.instruments.plots.pictures import MARKERS, chart
from flux_lab.instruments.style import BLUE, CYCLE, DPI, FAINT, INK, PAPER, VERMILLION, WIDTH
from flux_lab.scheduler import calculate_shift

SIGMA = "noise level σ (1 = only noise)"
Path = tuple[Sequence[float] | Tensor, Tensor]  # the levels, and the numbers there: [levels, numbers]


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Charts side by side, as wide as a notebook."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def level_paths(panels: Mapping[str, Path], ylabel: str, by_end: bool = False) -> Figure:
    """Numbers on their way from noise (left) to picture (right), one panel for each named set of paths.

    Each set is (levels, tensor [levels, numbers]). `by_end` colours a path by the sign of the number where it ends.
    """
    figure, drawn = _panels(len(panels), height=3.4)
    for axes, (name, (levels, numbers)) in zip(drawn, panels.items(), strict=True):
        if len(levels) != len(numbers):
            raise ValueError(f"panels: {name!r} has {len(levels)} levels and numbers at {len(numbers)}, expected as many")
        levels = [float(level) for level in levels]
        for place, path in enumerate(numbers.float().T.tolist()):
            color = (BLUE if path[-1] > 0 else VERMILLION) if by_end else CYCLE[place % len(CYCLE)]
            # Points show where the walk stopped to ask; more than some hide the lines.
            marker = "o" if len(levels) <= 30 else None
            axes.plot(levels, path, color=color, marker=marker, markersize=2.5, linewidth=1.2)
        axes.set(title=name, xlabel=SIGMA, ylabel=ylabel, xlim=(1.02, -0.02))
    for axes in drawn[1:]:
        axes.sharey(drawn[0])
    return figure


def mu_line(pictures: Mapping[str, int]) -> Figure:
    """The line that gives the shift mu for a number of image tokens, its two fixed points, and some named pictures on it."""
    figure, axes = chart(3.4, xlabel="image tokens", ylabel="shift μ")
    fixed = (256, 4096)
    tokens = np.linspace(0, 1.08 * max(*fixed, *pictures.values()))
    axes.plot(tokens, [calculate_shift(count) for count in tokens], color=FAINT, linewidth=1.5)
    axes.plot(fixed, [calculate_shift(count) for count in fixed], "s", color=VERMILLION, markersize=8, label="the two fixed points")
    axes.plot(list(pictures.values()), [calculate_shift(count) for count in pictures.values()], "o", color=BLUE, label="pictures")
    for place, (name, count) in enumerate(pictures.items()):
        above = place % 2
        where = {"xytext": (-6, 12) if above else (8, -14), "ha": "right" if above and count > fixed[0] else "left"}
        axes.annotate(
            f"{name}: {calculate_shift(count):.2f}",
            (count, calculate_shift(count)),
            textcoords="offset points",
            fontsize=8.5,
            color=INK,
            **where,
        )
    axes.set_ylim(bottom=0.3)
    axes.legend(frameon=False, loc="lower right")
    return figure


def shifted(sigmas: np.ndarray, mu: float) -> np.ndarray:
    """The shift, for curves: the odds sigma / (1 - sigma) times e^mu. Sigmas strictly between 0 and 1."""
    odds = math.exp(mu) * sigmas / (1 - sigmas)
    return odds / (1 + odds)


def shift_curves(mus: Mapping[str, float]) -> Figure:
    """Noise level before and after the shift, for each named mu: on plain axes, and on axes that are even in the logarithm of the odds."""
    figure, (plain, even) = _panels(2, height=4.2)
    sigmas = 1 / (1 + np.exp(-np.linspace(-6, 6, 201)))
    for place, (name, mu) in enumerate(mus.items()):
        for axes in (plain, even):
            axes.plot(sigmas, shifted(sigmas, mu), color=CYCLE[place % len(CYCLE)], linewidth=1.8, label=f"{name}, μ = {mu:.2f}")
    for axes in (plain, even):
        axes.set(xlabel="σ before the shift", ylabel="σ after the shift", xlim=(0, 1), ylim=(0, 1))
    plain.set_title("plain axes")
    plain.legend(frameon=False, loc="lower right", fontsize=9)
    even.set_title("axes even in log(σ / (1 − σ))")
    ticks = (0.02, 0.1, 0.5, 0.9, 0.98)
    for name, axis in (("x", even.xaxis), ("y", even.yaxis)):
        getattr(even, f"set_{name}scale")("logit")
        getattr(even, f"set_{name}lim")(0.01, 0.99)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FixedFormatter([str(tick) for tick in ticks]))
        axis.set_minor_formatter(NullFormatter())
    return figure


def schedules(curves: Mapping[str, Sequence[float] | Tensor]) -> Figure:
    """Named schedules: the noise level after each step (left), and where on the scale of noise levels their steps stand (right)."""
    figure, (curve, rug) = _panels(2, height=3.6)
    for place, (name, sigmas) in enumerate(curves.items()):
        levels = [float(sigma) for sigma in sigmas]
        color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        curve.plot(levels, color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
        rug.vlines(levels, place - 0.35, place + 0.35, color=color, linewidth=1.8)
    curve.set(xlabel="steps taken", ylabel=SIGMA, ylim=(-0.03, 1.03))
    curve.xaxis.set_major_locator(MaxNLocator(integer=True))
    curve.legend(frameon=False)
    rug.set(xlabel=SIGMA, xlim=(1.02, -0.02), ylim=(len(curves) - 0.5, -0.5), title="one line for each level")
    rug.set_yticks(range(len(curves)), curves)
    return figure


def convergence(errors: Mapping[str, Mapping[int, float]]) -> Figure:
    """Error against number of steps, both logarithmic, for each named schedule, and the slope of a method whose error halves when the
    steps are doubled."""
    figure, axes = chart(3.6, xlabel="steps (each line doubles)", ylabel="error (1 = as large as the result)", xscale="log", yscale="log")
    for place, (name, error) in enumerate(errors.items()):
        color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        axes.plot(list(error), list(error.values()), color=color, marker=marker, linewidth=1.5, label=name)
    counts, start = _counts(errors.values())
    axes.plot(
        counts, [start * counts[0] / count for count in counts], color=INK, linestyle=":", linewidth=1.2, label="half at twice the steps"
    )
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_major_formatter(FixedFormatter([str(count) for count in counts]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False)
    return figure


def _counts(errors: Iterable[Mapping[int, float]]) -> tuple[list[int], float]:
    """All numbers of steps, and the error that the dotted line starts from."""
    errors = list(errors)
    return sorted({count for error in errors for count in error}), max(next(iter(error.values())) for error in errors)
