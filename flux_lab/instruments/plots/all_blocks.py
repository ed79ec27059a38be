"""Pictures with a place for every block: bars, and small images, double-stream blocks first."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from flux_lab.instruments.style import BLUE, DPI, INK, PAPER, VERMILLION, WIDTH

COLORS = {"double": BLUE, "single": VERMILLION}
ACROSS = 10  # small images in a row


def _color(block: str) -> str:
    """The colour of a block's kind. Raises ValueError for a name that is not like `double 07` or `single 30`."""
    kind = block.split(" ")[0]
    if kind not in COLORS:
        raise ValueError(f"expected blocks named like 'double 07' or 'single 30', got {block!r}")
    return COLORS[kind]


def _label_blocks(axes: Axes, blocks: list[str]) -> None:
    """Every third block's number, and a line between the two kinds."""
    shown = [place for place, block in enumerate(blocks) if int(block.split(" ")[1]) % 3 == 0]
    axes.set_xticks(shown, [str(int(blocks[place].split(" ")[1])) for place in shown], fontsize=8)
    axes.set_xlim(-0.8, len(blocks) - 0.2)
    starts = [place for place in range(1, len(blocks)) if _color(blocks[place]) != _color(blocks[place - 1])]
    for place in starts:
        axes.axvline(place - 0.5, color=INK, linewidth=0.8)
    for place in (0, *starts):
        kind = blocks[place].split(" ")[0]
        axes.annotate(
            f"{kind}-stream blocks",
            (place, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=9,
            color=COLORS[kind],
        )
    axes.set_xlabel("block")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, 0.5 + 2.3 * count), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def block_bars(panels: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar for every block, one panel for each named quantity; the longest bar of a panel has its block's name."""
    figure, drawn = _panels(len(panels))
    for axes, (label, values) in zip(drawn, panels.items(), strict=True):
        blocks = list(values)
        axes.bar(range(len(blocks)), list(values.values()), 0.75, color=[_color(block) for block in blocks])
        largest = max(values, key=values.get)
        place = blocks.index(largest)
        side = "left" if place < len(blocks) / 2 else "right"
        above = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": 8.5, "color": INK}
        axes.annotate(largest, (place - 0.4 if side == "left" else place + 0.4, values[largest]), ha=side, **above)
        axes.set_ylim(top=1.1 * values[largest] or 1)
        axes.set_ylabel(label)
        _label_blocks(axes, blocks)
    return figure


def block_sheet(images: Mapping[str, Image.Image]) -> Figure:
    """A small image for every block under its name, in the colour of its kind; other names stand in black."""
    down = -(-len(images) // ACROSS)
    cell = WIDTH / ACROSS
    heading = 0.2
    height = down * (cell + heading)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    for place, (name, image) in enumerate(images.items()):
        row, column = divmod(place, ACROSS)
        bottom = height - (row + 1) * (cell + heading)
        axes = figure.add_axes(((column + 0.02) / ACROSS, bottom / height, 0.96 / ACROSS, 0.96 * cell / height))
        axes.imshow(image)
        axes.set_axis_off()
        axes.set_title(name, fontsize=8.5, color=COLORS.get(name.split(" ")[0], INK), pad=2)
    return figure
