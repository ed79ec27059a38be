"""Pictures of the autoencoder: what its levels hold, its latents' spread, what it loses, and the seams of tiles."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flux_lab.autoencoder import DiagonalGaussianDistribution
from flux_lab.instruments.plots.pictures import LABELS, MARKERS, chart
from flux_lab.instruments.style import BLUE, CYCLE, DPI, INK, PAPER, VERMILLION
from flux_lab.shapes import shaped

BINS = 120
FEW = 2048  # numbers of a map that are drawn as squares
AMOUNTS = "viridis"  # for values from zero up
LOWEST, HIGHEST = 0.01, 0.99  # quantiles that become black and white
CELL = 1.05  # inches of a small image
FEATURE = 0.7  # inches of a feature map
PANEL = 1.95  # inches of a map of numbers
LINE = 0.17  # inches of a line of a heading


# ---- many small images --------------------------------------------------------------------------------------------------


def small_grid(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str] = (), cell: float = CELL) -> Figure:
    """Images in named rows as `image_grid` has them, but each only `cell` inches wide, for many images in a small file.

    Raises ValueError when rows and headings differ in number.
    """
    counts = {len(images) for images in rows.values()} | ({len(columns)} if columns else set())
    if len(counts) != 1 or counts == {0}:
        lengths = {name: len(images) for name, images in rows.items()}
        raise ValueError(f"small_grid: expected rows and headings of one length, got {lengths} and {len(columns)} headings")
    labels = LABELS if any(rows) else 0.0
    top = 0.06 + LINE * max((heading.count("\n") + 1 for heading in columns), default=0)
    width, height = labels + cell * counts.pop(), top + cell * len(rows)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    for row, (name, images) in enumerate(rows.items()):
        middle = 1 - (top + (row + 0.5) * cell) / height
        figure.text((labels - 0.08) / width, middle, name, ha="right", va="center", fontsize=8.5, color=INK)
        for column, image in enumerate(images):
            left, lower = labels + column * cell, height - top - (row + 1) * cell
            axes = figure.add_axes((left / width, lower / height, 0.96 * cell / width, 0.96 * cell / height))
            axes.imshow(image)
            axes.set_axis_off()
            if row == 0 and columns:
                axes.set_title(columns[column], fontsize=8.5, color=INK, pad=3)
    return figure


# ---- levels -------------------------------------------------------------------------------------------------------------


def feature_maps(levels: Mapping[str, Float[Tensor, "batch channels height width"]], count: int = 5) -> Figure:
    """A row for every level: the `count` channels of the first picture that vary most, each from its own black to its own white."""
    rows = {}
    for name, features in levels.items():
        maps = features[0].float().cpu()
        chosen = maps.var(dim=(1, 2)).topk(min(count, len(maps))).indices.tolist()
        shape = " × ".join(str(size) for size in maps.shape)
        rows[f"{name}\n{shape}"] = [_as_image(maps[channel]) for channel in chosen]
    return small_grid(rows, cell=FEATURE)


def _as_image(values: Tensor) -> Image.Image:
    lowest, highest = np.quantile(values.numpy(), (LOWEST, HIGHEST))
    gray = ((values - lowest) / max(highest - lowest, 1e-12)).clamp(0, 1)
    return Image.fromarray((gray * 255).round().to(torch.uint8).numpy()).convert("RGB")


def level_sizes(sizes: Mapping[str, Mapping[str, int]]) -> Figure:
    """How many numbers each stage of a walk hands on, one curve for each named model, on a logarithmic scale."""
    stages = list(next(iter(sizes.values())))
    figure, axes = chart(3.6, ylabel="numbers handed on (logarithmic)", yscale="log")
    for place, (name, counts) in enumerate(sizes.items()):
        color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        axes.plot(range(len(stages)), [counts[stage] for stage in stages], color=color, marker=marker, label=name)
    axes.set_xticks(range(len(stages)), stages, rotation=40, ha="right", fontsize=8.5)
    axes.legend(frameon=False)
    return figure


# ---- latents ------------------------------------------------------------------------------------------------------------


def posterior_spread(posterior: DiagonalGaussianDistribution) -> Figure:
    """For every channel: how much the means vary from place to place, and how wide the posterior is around one mean."""
    channels = range(posterior.mean.shape[1])
    spread = rearrange(posterior.mean, "batch channels rows columns -> channels (batch rows columns)").std(dim=1)
    width = reduce(posterior.std, "batch channels rows columns -> channels", "mean")
    figure, axes = chart(3.2, xlabel="channel", ylabel="standard deviation (logarithmic)", yscale="log")
    axes.plot(channels, spread.tolist(), color=BLUE, marker="o", linestyle="", label="of the means, over all places")
    axes.plot(channels, width.tolist(), color=VERMILLION, marker="s", linestyle="", label="of the posterior, at one place (average)")
    axes.set_xticks(channels)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def histograms(values: Mapping[str, Tensor], xlabel: str, limit: float = 5.0, normal: bool = True) -> Figure:
    """The density of each named tensor's numbers between -limit and limit; `normal` adds that of the noise, mean 0 and deviation 1."""
    figure, axes = chart(3.2, xlabel=xlabel, ylabel="density")
    edges = np.linspace(-limit, limit, BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    for place, (name, tensor) in enumerate(values.items()):
        numbers = tensor.detach().float().flatten().cpu().numpy()
        density = np.histogram(numbers, edges)[0] / (len(numbers) * (edges[1] - edges[0]))
        axes.plot(middles, density, color=CYCLE[place % len(CYCLE)], linewidth=1.6, label=name)
    if normal:
        axes.plot(middles, np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi), color=INK, linestyle="--", label="standard normal")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


# ---- what is lost -------------------------------------------------------------------------------------------------------


def difference(first: Image.Image, second: Image.Image, times: float = 1.0) -> Image.Image:
    """Absolute difference of two images of one size, colour by colour, `times` as strong: black where they agree."""
    if first.size != second.size:
        raise ValueError(f"difference: expected two images of one size, got {first.size} and {second.size}")
    values = np.abs(np.asarray(first, dtype=np.float32) - np.asarray(second, dtype=np.float32))
    return Image.fromarray(np.clip(times * values, 0, 255).astype(np.uint8))


def heat_maps(maps: Mapping[str, Float[Tensor, "height width"]], label: str, highest: float | None = None) -> Figure:
    """Maps side by side on one scale from 0 to `highest`, by default the largest value. `label` says what is shown, with its unit."""
    top = max(float(values.max()) for values in maps.values()) if highest is None else highest
    scale = ScalarMappable(Normalize(0, top or 1.0), AMOUNTS)
    figure = Figure(figsize=(PANEL * len(maps) + 0.9, PANEL + 0.35), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        _draw_map(axes, values.detach().float().cpu().numpy(), scale)
        axes.set_title(name, fontsize=9.5, color=INK)
    panels[0].set_ylabel("row", fontsize=8.5)
    figure.colorbar(scale, ax=panels.tolist(), label=label, shrink=0.85, aspect=15)
    return figure


def _draw_map(axes: Axes, values: np.ndarray, scale: ScalarMappable) -> None:
    """A map of many numbers is drawn as a picture in colour, which is published as a smaller file."""
    axes.imshow(colormaps[AMOUNTS](scale.norm(values))[..., :3] if values.size > FEW else values, cmap=AMOUNTS, norm=scale.norm)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("column", fontsize=8.5)


def contrast_kept(widths: Sequence[int], kept: Mapping[str, Sequence[float]]) -> Figure:
    """Share of the contrast of stripes that is left, against the width of one stripe in pixels."""
    figure, axes = chart(3.2, xlabel="width of one stripe, pixels (logarithmic)", ylabel="contrast kept (1 = all of it)", xscale="log")
    axes.axhline(1, color=INK, linewidth=0.9, linestyle="--")
    for place, (name, shares) in enumerate(kept.items()):
        axes.plot(widths, shares, color=CYCLE[place % len(CYCLE)], marker=MARKERS[place % len(MARKERS)], label=name)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


@shaped
def neighbour_steps(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "width-1"]:
    """Mean absolute difference between every column of pixels and the next."""
    return (images[..., 1:] - images[..., :-1]).abs().mean(dim=(0, 1, 2))


def seam_profile(images: Mapping[str, Float[Tensor, "batch channels height width"]], seam: int, around: int = 24) -> Figure:
    """How much neighbouring columns of pixels differ, near column `seam`, where one tile ends and the next begins."""
    figure, axes = chart(3.2, xlabel="column of pixels", ylabel="difference to the next column")
    axes.axvline(seam - 1, color=INK, linewidth=0.9, linestyle="--", label="last column of the left tile")
    for place, (name, batch) in enumerate(images.items()):
        steps = neighbour_steps(batch).tolist()
        columns = range(max(0, seam - around), min(len(steps), seam + around))
        color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        axes.plot(columns, [steps[column] for column in columns], color=color, marker=marker, markersize=3, linewidth=1.3, label=name)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
