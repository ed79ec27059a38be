"""Pictures of speed."""

import pytest
from matplotlib.figure import Figure

from flux_lab.instruments import plots
from flux_lab.instruments.plots import Roof


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_ratio_bars() -> None:
    cases = {"step": {"ours": (1.25, 1.2, 1.3), "fast": (0.5, 0.4, 0.75)}, "vae": {"fast": (0.9, 0.9, 0.9)}}
    figure = plots.ratio_bars(cases)
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches] == [1.25, 0.5, 0.9]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["step", "vae"]
    assert {"1.25", "0.50", "0.90", "ours", "fast"} <= set(texts(figure))
    assert axes.get_xlim()[0] == 0
    assert axes.yaxis_inverted()
    middles = [patch.get_y() + patch.get_height() / 2 for patch in axes.patches]
    assert [round(middle) for middle in middles] == [0, 0, 1]
    with pytest.raises(ValueError, match="cases: expected at least one case"):
        plots.ratio_bars({})


def test_predictions() -> None:
    figure = plots.predictions({"fused": (0.6, (0.7, 0.65, 0.8)), "hoisted": (0.9, (0.95, 0.9, 1.0))})
    (axes,) = figure.axes
    measured, predicted = axes.lines[:2]
    assert list(measured.get_xdata()) == [0.7, 0.95]
    assert list(predicted.get_xdata()) == [0.6, 0.9]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fused", "hoisted"]


def test_a_roof_has_a_slope_and_a_ceiling() -> None:
    roof = Roof(flops=100.0, bandwidth=10.0)
    assert [roof.at(each) for each in (1, 5, 10, 1000)] == [10, 50, 100, 100]


def test_roofline() -> None:
    figure = plots.roofline({"float32": Roof(1e11, 1e10)}, {"small": (2.0, 1e10)}, {"FLUX.1-dev": 1000.0})
    (axes,) = figure.axes
    roof, small, mark = axes.lines
    assert max(roof.get_ydata()) == pytest.approx(100)
    assert (list(small.get_xdata()), list(small.get_ydata())) == ([2.0], [10.0])
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([1000.0], [100.0]), "a mark stands on the roof"
    assert roof.get_xdata()[0] < 2
    assert roof.get_xdata()[-1] > 1000
    assert {"roof: float32", "small", "FLUX.1-dev"} <= set(texts(figure))
