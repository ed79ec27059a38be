"""Pictures of the rotary position embedding: a turning pair, the frequencies, the table of rotations, scores, rounding."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flux_lab.instruments.plots.pictures import MARKERS, chart
from flux_lab.instruments.style import CYCLE, DPI, FAINT, GREEN, INK, PAPER, SIGNED, VERMILLION, WIDTH
from flux_lab.shapes import shaped

AXIS_NAMES = ("unused", "row", "column")
PAIR = 2  # channels that turn together
FULL_TURN = 2 * np.pi
SCORES = "cividis"
STYLES = ("-", "-", (0, (3, 3)))  # of the three axes: two of them lie on each other


# ---- one pair -----------------------------------------------------------------------------------------------------------


def turning_pair(pair: tuple[float, float], frequency: float, position: int = 0, last: int = 24) -> Figure:
    """One pair of channels as an arrow in the plane, turned by `frequency` radians a position, and its two numbers against the position.

    The arrow at `position` is marked; those of the positions before it are drawn faintly.
    """
    figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, facecolor=PAPER, layout="constrained")
    plane, waves = figure.subplots(1, 2, width_ratios=(1, 1.9))
    steps = np.linspace(0, last, 400)
    length = float(np.hypot(*pair))
    plane.add_patch(Circle((0, 0), length, fill=False, edgecolor=FAINT, linestyle="--"))
    for place in range(position + 1):
        now = place == position
        tip = _turned(pair, place * frequency)
        arrow = {"arrowstyle": "-|>", "color": VERMILLION if now else FAINT, "linewidth": 2.4 if now else 1.2, "shrinkA": 0, "shrinkB": 0}
        plane.annotate("", xy=tip, xytext=(0, 0), arrowprops=arrow, zorder=3 if now else 2)
    reach = 1.25 * length
    plane.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="first number of the pair", ylabel="second number")
    plane.set_title(f"position {position}: turned by {position * frequency:.2f} rad", fontsize=9.5, color=INK)
    plane.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    plane.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
    for wave, color, name in zip(_turned(pair, steps * frequency), CYCLE, ("first number", "second number"), strict=False):
        waves.plot(steps, wave, color=color, label=name)
    for value, color in zip(_turned(pair, position * frequency), CYCLE, strict=False):
        waves.plot(position, value, "o", color=color, markersize=8)
    waves.axvline(position, color=VERMILLION, linewidth=1)
    waves.set(xlabel="position of the token", ylabel="value", xlim=(0, last), ylim=(-reach, reach))
    waves.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    return figure


def _turned(pair: tuple[float, float], angle: float | np.ndarray) -> tuple:
    return pair[0] * np.cos(angle) - pair[1] * np.sin(angle), pair[0] * np.sin(angle) + pair[1] * np.cos(angle)


# ---- all pairs ----------------------------------------------------------------------------------------------------------


def frequency_ladders(axes_dims: Mapping[str, Sequence[int]], sides: Mapping[str, int], theta: float = 10000.0) -> Figure:
    """Positions that each pair of a head needs for a full turn, on a logarithmic scale, a panel for each named model.

    `axes_dims`: the channels of each axis; `sides`: patches along a side of the model's usual picture, drawn as a line.
    """
    figure = Figure(figsize=(WIDTH, 3.7), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, len(axes_dims), squeeze=False, sharey=True)[0]
    for panel, (name, dims) in zip(panels, axes_dims.items(), strict=True):
        first = 0
        for axis, dim in enumerate(dims):
            pairs = np.arange(dim // PAIR)
            style = {"color": CYCLE[axis], "marker": MARKERS[axis], "markersize": 5, "linewidth": 1}
            panel.plot(first + pairs, FULL_TURN * theta ** (PAIR * pairs / dim), label=f"{AXIS_NAMES[axis]}: {dim} channels", **style)
            first += len(pairs)
        panel.axhline(sides[name], color=INK, linewidth=1, linestyle=":", label=f"side of the picture: {sides[name]} patches")
        panel.set(yscale="log", xlabel="pair of channels in the head", title=name)
        panel.legend(frameon=False, fontsize=8.5, loc="upper left")
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(3, FULL_TURN * theta * 30)
    panels[0].set_ylabel("positions for a full turn (logarithmic)")
    return figure


@shaped
def rotation_table(
    cos: Float[Tensor, "sequence head_dim"], sin: Float[Tensor, "sequence head_dim"], axes_dim: Sequence[int], length: int
) -> Figure:
    """Cosine and sine of every token and channel. Lines part the axes, and the `length` text tokens from the image tokens."""
    figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name, table in zip(panels, ("cosine", "sine"), (cos, sin), strict=True):
        drawn = panel.imshow(table.cpu().numpy(), cmap=SIGNED, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        edges = np.cumsum(axes_dim)
        panel.vlines(edges[:-1] - 0.5, -0.5, len(table) - 0.5, color=GREEN, linewidth=2)
        panel.axhline(length - 0.5, color=GREEN, linewidth=2)
        for edge, dim, axis in zip(edges, axes_dim, AXIS_NAMES, strict=False):
            panel.text(edge - dim / 2 - 0.5, -1.2, axis, ha="center", va="bottom", fontsize=8.5, color=INK)
        panel.set_title(name, fontsize=10, color=INK, pad=20)
        panel.set_xlabel("channel of the head")
        panel.tick_params(labelsize=8)
    panels[0].set_ylabel("token of the sequence, text first")
    for middle, name in ((length / 2, "text"), (length + (len(cos) - length) / 2, "image")):
        box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        panels[1].text(cos.shape[1] - 0.2, middle, name, rotation=90, ha="left", va="center", fontsize=9, color=INK, bbox=box)
    figure.colorbar(drawn, ax=panels, label="value", shrink=0.9, aspect=22)
    return figure


# ---- scores -------------------------------------------------------------------------------------------------------------


def score_curves(models: Mapping[str, Mapping[str, Sequence[float] | Tensor]], sides: Mapping[str, int] | None = None) -> Figure:
    """Score against distance, a panel for each named model, a curve for each named axis; the first value is that of distance 0.

    `sides`: patches along a side of the model's usual picture, drawn as a line.
    """
    figure = Figure(figsize=(WIDTH, 3.4), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for panel, (name, curves) in zip(panels, models.items(), strict=True):
        for place, (axis, scores) in enumerate(curves.items()):
            style = {"color": CYCLE[place % len(CYCLE)], "linestyle": STYLES[place % len(STYLES)], "linewidth": 2}
            panel.plot(range(len(scores)), [float(score) for score in scores], label=axis, **style)
        if sides:
            panel.axvline(sides[name], color=INK, linewidth=1, linestyle=":")
            panel.text(sides[name], panel.get_ylim()[1], " side of the picture", ha="left", va="top", fontsize=8.5, color=INK)
        panel.set(xlabel="distance of query and key, in patches", title=name)
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("score, as a share of the highest")
    return figure


def place_maps(maps: Mapping[str, Tensor], label: str, marks: Mapping[str, tuple[int, int]] | None = None, centred: bool = False) -> Figure:
    """Numbers laid out as the patches lie in the picture, [rows, columns] each, under their names and on one scale of colours.

    `marks`: for a map's name the (row, column) of a place to mark. `centred`: rows and columns count from the middle, as distances.
    """
    arrays = {name: values.float().cpu().numpy() for name, values in maps.items()}
    figure = Figure(figsize=(min(WIDTH, 3.1 * len(arrays) + 1.0), 3.4), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, len(arrays), squeeze=False)[0]
    scale = {"vmin": min(array.min() for array in arrays.values()), "vmax": max(array.max() for array in arrays.values())}
    for panel, (name, values) in zip(panels, arrays.items(), strict=True):
        drawn = panel.imshow(values, cmap=SCORES, extent=_extent(values.shape, centred), **scale)
        panel.set_title(name, fontsize=9.5, color=INK)
        panel.set_xlabel("columns to the right" if centred else "column of the patch", fontsize=8.5)
        panel.tick_params(labelsize=8)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if marks and name in marks:
            row, column = marks[name]
            panel.plot(column, row, "o", markersize=11, markerfacecolor="none", markeredgecolor=VERMILLION, markeredgewidth=2)
    panels[0].set_ylabel("rows down" if centred else "row of the patch", fontsize=8.5)
    figure.colorbar(drawn, ax=panels, shrink=0.8, label=label)
    return figure


def _extent(shape: tuple[int, int], centred: bool) -> tuple[float, float, float, float]:
    """Edges of a map: left, right, lower, upper."""
    rows, columns = shape
    down, across = ((rows - 1) / 2, (columns - 1) / 2) if centred else (0, 0)
    return -0.5 - across, columns - 0.5 - across, rows - 0.5 - down, -0.5 - down


# ---- rounding -----------------------------------------------------------------------------------------------------------


def rounding(positions: Sequence[float] | Tensor, errors: Mapping[str, Tensor], marks: Mapping[str, float]) -> Figure:
    """Largest error of a cosine against the position, a curve for each number format. `marks`: named positions, drawn as lines."""
    labels = {"xlabel": "position (logarithmic)", "ylabel": "largest error of a cosine (logarithmic)"}
    figure, axes = chart(3.6, xscale="log", yscale="log", **labels)
    for place, (name, error) in enumerate(errors.items()):
        axes.plot([float(position) for position in positions], error.cpu().numpy(), color=CYCLE[place], linewidth=1.6, label=name)
    for name, position in marks.items():
        axes.axvline(position, color=INK, linewidth=1, linestyle=":")
        # Between the curves: half-way up, whatever the scale.
        placed = {"transform": axes.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "center"}
        axes.text(position, 0.56, name, fontsize=8.5, color=INK, **placed)
    axes.legend(frameon=False, ncols=len(errors), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
