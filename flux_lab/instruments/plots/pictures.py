"""Pictures that every lesson uses: images in rows, latents, curves, bars; and `show`, which puts one into the notebook."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from IPython.display import display
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageChops
from torch import Tensor

from flux_lab.instruments.style import BLUE, CYCLE, DPI, INK, PAPER, SIGNED, WIDTH
from flux_lab.pipeline import DenoisingState
from flux_lab.shapes import shaped

LABELS = 1.15  # inches for the names of the rows
LARGEST = 2.6  # inches of one image, at most
MARKERS = "osD^v"
JPEG_QUALITY = 85
FALSE_COLOR = 40  # of 255
ROW_NAMES = {"latents": "latents,\ndecoded", "x0": "predicted\npicture x0"}


def png(picture: Figure | Image.Image) -> bytes:
    """A figure or an image as the bytes of a PNG file. Raises TypeError for anything else."""
    return _written(picture, "png")


def encoded(picture: Figure | Image.Image) -> tuple[str, bytes]:
    """The mime type and the bytes in which a picture is small: charts as PNG with a palette, photographs as JPEG."""
    if _is_photographic(picture):
        return "image/jpeg", _written(picture, "jpeg", quality=JPEG_QUALITY)
    buffer = io.BytesIO()
    with_palette(Image.open(io.BytesIO(png(picture))).convert("RGB")).save(buffer, format="png", optimize=True)
    return "image/png", buffer.getvalue()


def with_palette(image: Image.Image) -> Image.Image:
    """An RGB image in 256 colours. The usual choice, by median cut, may give a rare colour no place, such as those of a colour bar: where
    one is off by more than `FALSE_COLOR`, colours are chosen that cover all."""
    usual = image.quantize(256)
    off = max(high for _, high in ImageChops.difference(usual.convert("RGB"), image).getextrema())
    return image.quantize(256, Image.Quantize.MAXCOVERAGE) if off > FALSE_COLOR else usual


def _written(picture: Figure | Image.Image, file_format: str, **options: int) -> bytes:
    if not isinstance(picture, Figure | Image.Image):
        raise TypeError(f"picture: expected a matplotlib figure or a PIL image, got {type(picture).__name__}")
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        # Without the name and version of what made it, the file is the same at every build.
        metadata = {"metadata": {"Software": None}} if file_format == "png" else {}
        picture.savefig(buffer, format=file_format, pil_kwargs=options, **metadata)
    else:
        picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def _is_photographic(picture: Figure | Image.Image) -> bool:
    """Whether a picture is an image or a figure made of images in colour."""
    axes = picture.axes if isinstance(picture, Figure) else []
    return isinstance(picture, Image.Image) or any(image.get_array().ndim == len("RGB") for each in axes for image in each.get_images())


def show(picture: Figure | Image.Image, alt: str) -> None:
    """Put a picture under the cell. `alt` says what is to be seen, for those who cannot see it; it must not be empty."""
    if not alt.strip():
        raise ValueError("alt: expected a sentence that says what is to be seen, got an empty string")
    mime, content = encoded(picture)
    data = {mime: base64.b64encode(content).decode(), "text/plain": alt}
    display(data, metadata={mime: {"alt": alt}}, raw=True)


# ---- pictures -----------------------------------------------------------------------------------------------------------


def image_grid(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str] = ()) -> Figure:
    """Images in rows with a name and, if given, columns with a heading. Raises ValueError when rows or headings differ in number."""
    if not rows or not all(rows.values()):
        raise ValueError("rows: expected at least one row with at least one image")
    count = len(next(iter(rows.values())))
    if any(len(images) != count for images in rows.values()) or (columns and len(columns) != count):
        lengths = {name: len(images) for name, images in rows.items()}
        raise ValueError(f"expected rows and column headings of one length, got {lengths} and {len(columns)} headings")
    labels = LABELS if any(rows) else 0.0
    cell = min(LARGEST, (WIDTH - labels) / count)
    heading = 0.22 * max((heading.count("\n") + 1 for heading in columns), default=0)
    width, height = labels + count * cell, heading + len(rows) * cell
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    for row, (name, images) in enumerate(rows.items()):
        figure.text(
            (labels - 0.1) / width, 1 - (heading + (row + 0.5) * cell) / height, name, ha="right", va="center", fontsize=9.5, color=INK
        )
        for column, image in enumerate(images):
            left, upper = labels + (column + 0.02) * cell, heading + (row + 0.02) * cell
            axes = figure.add_axes((left / width, 1 - (upper + 0.96 * cell) / height, 0.96 * cell / width, 0.96 * cell / height))
            axes.imshow(image)
            axes.set_axis_off()
            if row == 0 and columns:
                axes.set_title(columns[column], fontsize=8.5, color=INK, pad=3)
    return figure


def gallery(images: Sequence[Image.Image], titles: Sequence[str] = ()) -> Figure:
    """Images side by side, each under its title."""
    return image_grid({"": images}, titles)


def film_strip(states: Iterable[DenoisingState], of: Sequence[str] = ("latents", "x0")) -> Figure:
    """Steps of a denoising loop from left to right, seen as its latents and as the picture that each step aims at."""
    states = list(states)
    rows = {ROW_NAMES[each]: [state.image(each) for state in states] for each in of}
    return image_grid(rows, [f"step {state.index + 1}\nσ {state.sigma:.2f} → {state.sigma_next:.2f}" for state in states])


@shaped
def latent_channels(latents: Float[Tensor, "batch channels height width"]) -> Figure:
    """Every channel of the first latents of a batch as a small map, all on one scale."""
    maps = latents[0].float().cpu().numpy()
    across = min(len(maps), 8)
    down = -(-len(maps) // across)
    figure = Figure(figsize=(WIDTH, 1.3 * down), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    limit = float(np.abs(maps).max()) or 1.0
    for channel, axes in enumerate(panels.flat):
        axes.set_axis_off()
        if channel < len(maps):
            drawn = axes.imshow(maps[channel], cmap=SIGNED, vmin=-limit, vmax=limit)
            axes.set_title(f"channel {channel}", fontsize=8, color=INK, pad=2)
    figure.colorbar(drawn, ax=panels, label="value of the latent", shrink=0.9, aspect=15)
    return figure


# ---- curves and bars ----------------------------------------------------------------------------------------------------


def chart(height: float, **labels: str) -> tuple[Figure, Axes]:
    """An empty chart of a notebook's width with named axes."""
    figure = Figure(figsize=(WIDTH * 0.75, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def legend_above(axes: Axes) -> None:
    """The curves' names in a row above the chart, where no curve can run through them."""
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(axes.get_legend_handles_labels()[0]))


def sigma_curve(curves: Mapping[str, Sequence[float] | Tensor]) -> Figure:
    """Noise level after every step, one curve for each named schedule. A schedule's last value is the 0 where it ends."""
    figure, axes = chart(3.2, xlabel="steps taken", ylabel="σ, the share of noise (1 = only noise)")
    for place, (name, sigmas) in enumerate(curves.items()):
        color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        axes.plot([float(sigma) for sigma in sigmas], color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
    axes.legend(frameon=False)
    return figure


def parameter_bars(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Parameters of every part, one bar for each named model, on a logarithmic scale."""
    parts = list(next(iter(counts.values())))
    figure, axes = chart(0.6 + 0.6 * len(parts), xlabel="parameters (logarithmic: each line is ten times the one before)", xscale="log")
    thick = 0.8 / len(counts)
    for place, (name, count) in enumerate(counts.items()):
        places = np.arange(len(parts)) + (place - (len(counts) - 1) / 2) * thick
        bars = axes.barh(places, [count[part] for part in parts], thick, color=CYCLE[place] if place else BLUE, label=name)
        axes.bar_label(bars, [f"{count[part]:,}" for part in parts], padding=4, fontsize=8, color=INK)
    axes.set_yticks(range(len(parts)), parts)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(counts))
    return figure
