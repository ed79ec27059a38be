"""Pictures of the conditioning: sinusoids, vectors that are alike, and the modulation signals of every block over time."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from flux_lab.config import FLUX_DEV
from flux_lab.instruments.plots.pictures import MARKERS, chart, legend_above
from flux_lab.instruments.style import BLUE, CYCLE, DPI, INK, PALE, PAPER, SIGNED, VERMILLION, WIDTH
from flux_lab.shapes import shaped

STRENGTH = "cividis"  # for values from zero up; readable with any kind of colour vision


@shaped
def sinusoids(timesteps: Float[Tensor, "times"], embedding: Float[Tensor, "times channels"]) -> Figure:
    """The sinusoids of every time as one row: cosines on the left, sines on the right, the slower the further right in each half."""
    figure, (axes,) = _panels(1, height=3.6)
    drawn = axes.imshow(
        _numbers(embedding),
        cmap=SIGNED,
        vmin=-1,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, embedding.shape[1] - 0.5, len(timesteps) - 0.5, -0.5),
    )
    _label_times(axes, timesteps, "t = 1000 σ (0 = no noise)", digits=0)
    half = embedding.shape[1] // 2
    axes.axvline(half - 0.5, color=INK, linewidth=1.2)
    axes.set_xlabel(f"channel (0 to {half - 1}: cosines, {half} to {2 * half - 1}: sines)")
    figure.colorbar(drawn, ax=axes, label="value")
    return figure


def likeness(vectors: Mapping[str, Float[Tensor, "times dim"]], timesteps: Float[Tensor, "times"]) -> Figure:
    """For each named set of vectors, the cosine of the angle between any two: from its smallest to 1, the same direction."""
    figure, panels = _panels(len(vectors), height=3.7)
    for axes, (name, rows) in zip(panels, vectors.items(), strict=True):
        unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
        cosines = _numbers(unit @ unit.T)
        drawn = axes.imshow(cosines, cmap=STRENGTH, vmin=min(cosines.min(), 0.999), vmax=1, interpolation="nearest")
        axes.set_title(name, fontsize=10, color=INK)
        _label_times(axes, timesteps, "t = 1000 σ", digits=0)
        places, labels = axes.get_yticks(), [label.get_text() for label in axes.get_yticklabels()]
        axes.set_xticks(places, labels)
        axes.set_xlabel("t = 1000 σ")
        figure.colorbar(drawn, ax=axes, label="cosine of the angle", shrink=0.9)
    return figure


def rounding_errors(wanted: Float[Tensor, "steps"], told: Float[Tensor, "steps"]) -> Figure:
    """By how much the time that the network is told differs from the time that was meant, step by step."""
    figure, axes = chart(2.6, xlabel=f"step (of {len(wanted)})", ylabel="told − meant\n(units of t = 1000 σ)")
    axes.vlines(range(1, len(wanted) + 1), 0, _numbers(told) - _numbers(wanted), color=BLUE, linewidth=1.5)
    axes.plot(range(1, len(wanted) + 1), _numbers(told) - _numbers(wanted), MARKERS[0], color=BLUE, markersize=5)
    axes.axhline(0, color=INK, linewidth=0.8)
    return figure


def lengths(sigmas: Sequence[float] | Tensor, vectors: Mapping[str, Float[Tensor, "times dim"]]) -> Figure:
    """The length of each named vector against the noise level, which falls from left to right."""
    figure, axes = chart(3.2, xlabel="noise level σ (1 = only noise)", ylabel="length of the vector")
    for place, (name, rows) in enumerate(vectors.items()):
        style = {"color": CYCLE[place % len(CYCLE)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4, "linewidth": 1.5}
        axes.plot([float(sigma) for sigma in sigmas], _numbers(rows.norm(dim=1)), label=name, **style)
    axes.invert_xaxis()
    legend_above(axes)
    return figure


def token_maps(stages: Mapping[str, Float[Tensor, "tokens channels"]]) -> Figure:
    """Tokens by channels at several stages, each on its own scale around zero, which ends where one number in a hundred lies beyond."""
    figure, panels = _panels(len(stages), height=3.4)
    for axes, (name, tokens) in zip(panels, stages.items(), strict=True):
        numbers = _numbers(tokens)
        drawn = _signed_map(axes, numbers, limit=float(np.quantile(np.abs(numbers), 0.99)))
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_xlabel("channel")
        axes.set_ylabel("token")
        figure.colorbar(drawn, ax=axes, location="bottom", label="value (1 % lie beyond the ends)", shrink=0.9, extend="both")
    return figure


def modulation_map(
    maps: Mapping[str, Float[Tensor, "blocks times"]], sigmas: Sequence[float] | Tensor, double: int = FLUX_DEV.num_layers, across: int = 3
) -> Figure:
    """The strength of modulation signals: a row for each block, a column for each noise level, a panel for each signal.

    Above the line stand the `double` first blocks, below it the single-stream ones. Numbers that do not exist (nan) stay pale.
    """
    down = -(-len(maps) // across)
    figure = Figure(figsize=(WIDTH, 3.7 * down), dpi=DPI, facecolor=PAPER, layout="constrained")
    for axes, (name, values) in zip(figure.subplots(down, across, squeeze=False).flat, maps.items(), strict=False):
        axes.set_facecolor(PALE)
        drawn = axes.imshow(_numbers(values), cmap=STRENGTH, vmin=0, aspect="auto", interpolation="nearest")
        axes.axhline(double - 0.5, color=VERMILLION, linewidth=1.5)
        axes.set_title(name, fontsize=10, color=INK)
        _label_sigmas(axes, sigmas)
        _label_blocks(axes, len(values), double)
        figure.colorbar(drawn, ax=axes, label="root mean square", aspect=30)
    return figure


def channel_map(signals: Mapping[str, Float[Tensor, "times channels"]], sigmas: Sequence[float] | Tensor, title: str = "") -> Figure:
    """Every channel of a block's modulation signals over time: a row for each noise level, a panel for each signal."""
    across = 3
    down = -(-len(signals) // across)
    figure = Figure(figsize=(WIDTH, 2.6 * down + 0.3), dpi=DPI, facecolor=PAPER, layout="constrained")
    for axes, (name, values) in zip(figure.subplots(down, across, squeeze=False).flat, signals.items(), strict=False):
        drawn = _signed_map(axes, _numbers(values).T)
        axes.set_title(name, fontsize=10, color=INK)
        _label_sigmas(axes, sigmas)
        axes.set_ylabel("channel")
        figure.colorbar(drawn, ax=axes, aspect=30)
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


# ---- what the maps share ------------------------------------------------------------------------------------------------


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False).flat)


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def _signed_map(axes: Axes, values: np.ndarray, limit: float | None = None) -> AxesImage:
    """A map around zero, by default up to its largest value."""
    limit = (float(np.abs(values).max()) if limit is None else limit) or 1.0
    return axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")


def _some(count: int, most: int = 6) -> list[int]:
    """At most `most` places from the first to the last, evenly spread."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _label_times(axes: Axes, times: Tensor, label: str, digits: int) -> None:
    places = _some(len(times))
    axes.set_yticks(places, [f"{float(times[place]):.{digits}f}" for place in places])
    axes.set_ylabel(label)


def _label_sigmas(axes: Axes, sigmas: Sequence[float] | Tensor) -> None:
    places = _some(len(sigmas), most=5)
    axes.set_xticks(places, [f"{float(sigmas[place]):.2f}" for place in places])
    axes.set_xlabel("noise level σ (1 = only noise)")


def _label_blocks(axes: Axes, count: int, double: int) -> None:
    """Every fifth block by its number among those of its kind."""
    places = [*range(0, min(double, count), 5), *range(double, count, 5)]
    axes.set_yticks(places, [str(place if place < double else place - double) for place in places], fontsize=8)
    axes.set_ylabel("single block        double block" if double < count else "double block")
