"""Pictures of tokens: patches of latents and the numbers they become, the order of these numbers, and position ids."""

from collections.abc import Mapping, Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from flux_lab.instruments.style import BLUE, CYCLE, DPI, FAINT, INK, PALE, PAPER, SIGNED, VERMILLION, WIDTH
from flux_lab.latents import PATCH
from flux_lab.shapes import shaped

WHOLE_NUMBERS = "cividis"
PLACES = ("upper left", "upper right", "lower left", "lower right")  # of a patch, row by row
LEGIBLE = 12  # cells across a map in which numbers can still be read


@shaped
def packing(latents: Float[Tensor, "batch channels height width"], token: int = 0, channel: int = 0) -> Figure:
    """One token of the first latents of a batch: its patch in the map of a channel, in all channels, the numbers as they stand in the
    token, and the channel as far as it is put together again from the tokens up to this one.

    Raises ValueError for a token or a channel that is not there.
    """
    maps = latents[0].float().cpu().numpy()
    channels, height, width = maps.shape
    rows, columns = height // PATCH, width // PATCH
    for name, value, count in (("token", token, rows * columns), ("channel", channel, channels)):
        if not 0 <= value < count:
            raise ValueError(f"{name}: there are {count}, expected 0 to {count - 1}, got {value}")
    row, column = divmod(token, columns)
    patches = maps[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    colors = {"cmap": SIGNED, "vmin": -float(np.abs(maps).max() or 1.0), "vmax": float(np.abs(maps).max() or 1.0)}

    figure = Figure(figsize=(WIDTH, 4.9), dpi=DPI, facecolor=PAPER, layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(3.4, 0.5))
    before, inside, after = (figure.add_subplot(grid[0, place]) for place in range(3))
    drawn = before.imshow(maps[channel], **colors)
    before.set_title(f"channel {channel}: patch at row {row}, column {column}", fontsize=9.5, color=INK)
    _draw_mosaic(inside, patches, colors)
    inside.set_title(f"the patch in all {channels} channels", fontsize=9.5, color=INK)
    after.imshow(np.where(_is_unpacked(token, rows, columns), maps[channel], np.nan), **colors)
    after.set_title(f"unpacked from tokens 0 to {token}", fontsize=9.5, color=INK)
    for axes in (before, after):
        _draw_patch_lines(axes, rows, columns, chosen=(row, column))
    _draw_numbers(figure.add_subplot(grid[1, :]), rearrange(patches, "channels p_row p_column -> (channels p_row p_column)"), token, colors)
    figure.colorbar(drawn, ax=[before, inside, after], label="value of the latent", shrink=0.85, aspect=18)
    return figure


def _is_unpacked(token: int, rows: int, columns: int) -> np.ndarray:
    """Whether a latent lies in one of the tokens up to `token`, [height, width]."""
    numbers = np.arange(rows * columns).reshape(rows, columns)
    return (numbers <= token).repeat(PATCH, axis=0).repeat(PATCH, axis=1)


def _draw_patch_lines(axes: Axes, rows: int, columns: int, chosen: tuple[int, int]) -> None:
    axes.set_facecolor(PALE)
    axes.set_xticks(np.arange(0, columns * PATCH, 4))
    axes.set_yticks(np.arange(0, rows * PATCH, 4))
    axes.set_xlabel("column of the latents", fontsize=8.5)
    axes.set_ylabel("row of the latents", fontsize=8.5)
    axes.tick_params(labelsize=8)
    edges = {"color": "white", "linewidth": 0.8}
    axes.hlines(np.arange(1, rows) * PATCH - 0.5, -0.5, columns * PATCH - 0.5, **edges)
    axes.vlines(np.arange(1, columns) * PATCH - 0.5, -0.5, rows * PATCH - 0.5, **edges)
    corner = (chosen[1] * PATCH - 0.5, chosen[0] * PATCH - 0.5)
    axes.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor=BLUE, linewidth=2.6, zorder=3))


def _draw_mosaic(axes: Axes, patches: np.ndarray, colors: dict) -> None:
    """The patches of all channels side by side, the channel's number in the corner of each."""
    across = int(np.ceil(len(patches) ** 0.5))
    down = -(-len(patches) // across)
    padded = np.full((down * across, PATCH, PATCH), np.nan, dtype=patches.dtype)
    padded[: len(patches)] = patches
    mosaic = rearrange(padded, "(down across) p_row p_column -> (down p_row) (across p_column)", down=down)
    axes.imshow(mosaic, **colors)
    axes.hlines(np.arange(1, down) * PATCH - 0.5, -0.5, across * PATCH - 0.5, color=INK, linewidth=1.2)
    axes.vlines(np.arange(1, across) * PATCH - 0.5, -0.5, down * PATCH - 0.5, color=INK, linewidth=1.2)
    for channel in range(len(patches)):
        left, upper = (channel % across) * PATCH - 0.42, (channel // across) * PATCH - 0.42
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
        axes.text(left, upper, str(channel), fontsize=7, color=INK, ha="left", va="top", bbox=box)
    axes.set_axis_off()


def _draw_numbers(axes: Axes, numbers: np.ndarray, token: int, colors: dict) -> None:
    """A token's numbers in their order, with a line between two channels."""
    inside = PATCH**2
    channels = len(numbers) // inside
    axes.imshow(numbers[None], aspect="auto", **colors)
    axes.vlines(np.arange(1, channels) * inside - 0.5, -0.5, 0.5, color=INK, linewidth=1.2)
    axes.set_xticks(np.arange(channels) * inside + (inside - 1) / 2, range(channels), fontsize=8)
    axes.set_yticks([])
    axes.set_title(f"token {token}: {len(numbers)} numbers", fontsize=9.5, color=INK)
    axes.set_xlabel("channel; of each channel " + ", ".join(PLACES), fontsize=8.5)


def token_orders(orders: Mapping[str, Sequence[tuple[int, int, int]]], shown: int = 32) -> Figure:
    """What stands where inside a token, a strip for each named order.

    An order is a list of (channel, patch row, patch column). The colour of a cell is the place in the patch, its number the channel;
    of a long token only the first `shown` cells are drawn.
    """
    figure = Figure(figsize=(WIDTH, 0.9 + 0.62 * len(orders)), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    shown = min(shown, *(len(order) for order in orders.values()))
    for line, order in enumerate(orders.values()):
        for slot, (channel, p_row, p_column) in enumerate(list(order)[:shown]):
            color = CYCLE[(p_row * PATCH + p_column) % len(CYCLE)]
            axes.add_patch(Rectangle((slot, line - 0.36), 0.94, 0.72, facecolor=color, edgecolor="none"))
            axes.text(slot + 0.47, line, str(channel), ha="center", va="center", fontsize=8, color="white", weight="bold")
    handles = [Rectangle((0, 0), 1, 1, facecolor=CYCLE[place]) for place in range(PATCH**2)]
    axes.legend(handles, PLACES, ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    axes.set(xlim=(0, shown), ylim=(len(orders) - 0.5, -0.5), xlabel=f"place in the token, the first {shown}; the number is the channel")
    axes.set_yticks(range(len(orders)), list(orders), fontsize=9)
    axes.set_xticks(np.arange(0, shown, 4) + 0.47, range(0, shown, 4))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


@shaped
def id_maps(ids: Float[Tensor, "tokens axes"], rows: int, columns: int) -> Figure:
    """Position ids laid out as the patches lie in the picture: the tokens' numbers, with a line through them, and each column of ids.

    Raises ValueError when there are not `rows * columns` tokens.
    """
    if len(ids) != rows * columns:
        raise ValueError(f"ids: expected {rows} x {columns} = {rows * columns} tokens, got {len(ids)}")
    maps = {"number of the token": np.arange(len(ids))} | {f"ids[:, {axis}]": numbers for axis, numbers in enumerate(ids.cpu().numpy().T)}
    figure = Figure(figsize=(WIDTH, 0.9 + 2.1 * rows / columns), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for place, (axes, (title, values)) in enumerate(zip(panels, maps.items(), strict=True)):
        values = rearrange(values, "(rows columns) -> rows columns", rows=rows)
        highest = max(float(values.max()), max(rows, columns) - 1) if place else float(values.max())
        axes.imshow(values, cmap=WHOLE_NUMBERS, vmin=0, vmax=highest, alpha=0.75)
        if max(rows, columns) <= LEGIBLE:
            _write_cells(axes, values, light_below=0.4 * highest)
        if place == 0:
            across, down = np.meshgrid(np.arange(columns), np.arange(rows))
            axes.plot(across.ravel(), down.ravel(), color=VERMILLION, linewidth=0.9, alpha=0.8, zorder=2)
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_xlabel("column of the patch", fontsize=8.5)
        axes.tick_params(labelsize=8, color=FAINT)
    panels[0].set_ylabel("row of the patch", fontsize=8.5)
    return figure


def _write_cells(axes: Axes, values: np.ndarray, light_below: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value < light_below else INK
        axes.text(column, row, f"{value:g}", ha="center", va="center", fontsize=7.5, color=color, zorder=3)
