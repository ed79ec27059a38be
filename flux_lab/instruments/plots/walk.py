"""Pictures of a walk through the blocks: lengths, turns, the way to the final velocity, and the pictures on the way."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flux_lab.instruments.plots.pictures import MARKERS
from flux_lab.instruments.style import BLUE, CYCLE, DPI, INK, ORANGE, PAPER, VERMILLION, WIDTH
from flux_lab.instruments.walk import Walk

STREAM_STYLE = {"image": {"color": BLUE, "marker": "o"}, "text": {"color": ORANGE, "marker": "s"}}
TICKS = 20  # names of blocks under a chart, at most


def walk_curves(walked: Walk) -> Figure:
    """Three charts over the blocks: the length of a token's vector, by how far a block turns it, and the distance to the final velocity."""
    figure = Figure(figsize=(WIDTH, 7.0), dpi=DPI, facecolor=PAPER, layout="constrained")
    lengths, turns, distance = figure.subplots(3, 1, sharex=True)
    for stream, style in STREAM_STYLE.items():
        lengths.plot(_floats(walked.norms(stream)), markersize=4, linewidth=1.5, label=f"{stream} tokens", **style)
        turns.plot(range(1, len(walked)), _floats(walked.turns(stream)), markersize=4, linewidth=1.5, **style)
    distance.plot(_floats(walked.distance), color=VERMILLION, marker="D", markersize=4, linewidth=1.5)
    lengths.legend(frameon=False)
    labels = ("length of a token\n(mean over tokens)", "turn in this block\n(degrees)", "distance to the\nfinal velocity (relative)")
    for axes, label in zip((lengths, turns, distance), labels, strict=True):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        _tidy(axes)
    _name_blocks(distance, walked.names)
    distance.set_xlabel("behind block")
    return figure


def stop_here(images: Sequence[Image.Image], names: Sequence[str], across: int = 10) -> Figure:
    """The picture that the model aims at when it stops at each named place, in reading order."""
    if len(images) != len(names) or not images:
        raise ValueError(f"names: expected one for each image, at least one, got {len(images)} images and {len(names)} names")
    across = min(across, len(images))
    down, cell, heading = -(-len(images) // across), min(2.6, WIDTH / across), 0.2
    width, height = across * cell, down * (cell + heading)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    for place, (image, name) in enumerate(zip(images, names, strict=True)):
        row, column = divmod(place, across)
        lower = height - (row + 1) * (cell + heading)
        axes = figure.add_axes(((column + 0.02) * cell / width, (lower + 0.02 * cell) / height, 0.96 * cell / width, 0.96 * cell / height))
        axes.imshow(image)
        axes.set_axis_off()
        axes.set_title(name, fontsize=8.5, color=INK, pad=2)
    return figure


def curves_by_block(curves: Mapping[str, Sequence[float] | Tensor], names: Sequence[str], ylabel: str) -> Figure:
    """A number for every named block, one curve for each named measurement."""
    figure = Figure(figsize=(WIDTH, 3.2), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(xlabel="block", ylabel=ylabel)
    for place, (label, values) in enumerate(curves.items()):
        style = {"color": CYCLE[place % len(CYCLE)], "marker": MARKERS[place % len(MARKERS)]}
        axes.plot(_floats(values), markersize=5, linewidth=1.3, label=label, **style)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(curves))
    _tidy(axes)
    _name_blocks(axes, names)
    return figure


def _floats(values: Sequence[float] | Tensor) -> list[float]:
    return [float(value) for value in values]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _name_blocks(axes: Axes, names: Sequence[str]) -> None:
    """Every block by name, or every second or third where they are many."""
    places = range(0, len(names), -(-len(names) // TICKS))
    axes.set_xticks(places, [names[place] for place in places], rotation=60, ha="right", fontsize=8)
