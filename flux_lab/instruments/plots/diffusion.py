"""Pictures of diffusion with discrete timesteps: the walk, which timesteps it visits, and how much of the picture is left at each."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from flux_lab.instruments.plots.autoencoder import small_grid
from flux_lab.instruments.plots.pictures import MARKERS, ROW_NAMES, chart
from flux_lab.instruments.style import CYCLE, INK

LAST_TIMESTEP = 1000
CELL = 0.85  # inches of a picture in a strip
Weights = tuple[Float[Tensor, "levels"], Float[Tensor, "levels"]]


def timestep_strip(states: Iterable, of: Sequence[str] = ("latents", "x0")) -> Figure:
    """States of SD 1.5's loop from left to right, as `film_strip` shows FLUX's: what it holds after each, and what each aims at."""
    states = list(states)
    rows = {ROW_NAMES[each]: [state.image(each) for state in states] for each in of}
    return small_grid(rows, [f"pass {state.index + 1}\nt = {state.timestep}" for state in states], cell=CELL)


def timestep_ticks(schedules: Mapping[str, Sequence[float] | Tensor]) -> Figure:
    """A row for each named schedule with a line at every timestep it visits, noise on the left. A timestep visited twice is longer."""
    figure, axes = chart(0.9 + 0.42 * len(schedules), xlabel="timestep (1000 = only noise)")
    for place, (name, timesteps) in enumerate(schedules.items()):
        visited, counts = np.unique([float(timestep) for timestep in timesteps], return_counts=True)
        for timestep, count in zip(visited, counts, strict=True):
            half = 0.28 if count == 1 else 0.45
            axes.vlines(timestep, place - half, place + half, color=CYCLE[place % len(CYCLE)], linewidth=1.2 * count, label=name)
    axes.set(xlim=(LAST_TIMESTEP + 15, -15), ylim=(len(schedules) - 0.5, -0.5))
    axes.set_yticks(range(len(schedules)), list(schedules))
    return figure


def signal_to_noise(schedules: Mapping[str, Weights], xlabel: str = "steps taken") -> Figure:
    """Power of the picture over that of the noise, logarithmic, from noise to picture. Each schedule is its two weights at every level.

    A level without picture has no logarithm: it is a triangle at the lower edge. A level without noise is left out.
    """
    figure, axes = chart(3.6, xlabel=xlabel, ylabel="signal-to-noise ratio (logarithmic)", yscale="log")
    empty = []
    for place, (name, (signal, noise)) in enumerate(schedules.items()):
        if len(signal) != len(noise):
            raise ValueError(
                f"schedules: {name!r} has {len(signal)} weights of the picture and {len(noise)} of the noise, expected as many"
            )
        ratios = {step: (float(a) / float(b)) ** 2 for step, (a, b) in enumerate(zip(signal, noise, strict=True)) if float(b)}
        color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        drawn = {step: ratio for step, ratio in ratios.items() if ratio}
        axes.plot(list(drawn), list(drawn.values()), color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
        empty += [(step, color) for step, ratio in ratios.items() if not ratio]
    axes.axhline(1, color=INK, linewidth=0.9, linestyle="--")
    lowest = axes.get_ylim()[0]
    for step, color in empty:
        axes.plot(step, lowest, marker="v", color=color, markersize=9, clip_on=False)
    axes.set_ylim(bottom=lowest)
    axes.legend(frameon=False)
    return figure
