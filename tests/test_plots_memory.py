"""Pictures of memory and rounding."""

import pytest
import torch
from matplotlib.figure import Figure

from flux_lab.instruments import plots


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_a_code_book_has_a_tick_for_each_level() -> None:
    figure = plots.code_books(torch.randn(500) / 4, {"even": [-1.0, 0.0, 1.0], "two": (0.5, -0.5)}, xlabel="weight / scale")
    assert [len(axes.collections[0].get_segments()) for axes in figure.axes] == [3, 2]
    assert {"even: 3 levels", "two: 2 levels", "weight / scale"} <= set(texts(figure))
    with pytest.raises(ValueError, match="books: expected at least one, each with at least one level"):
        plots.code_books(torch.randn(5), {"none": []}, xlabel="")


def test_every_span_has_its_own_peak() -> None:
    history = [(0.0, 1_000_000), (1.0, 5_000_000), (2.0, 0), (3.0, 2_000_000)]
    figure = plots.bytes_over_time(history, {"first": (0.0, 1.5), "second": (1.8, 3.0)})
    assert {"first\npeak 5.0 MB", "second\npeak 2.0 MB"} <= set(texts(figure))
    with pytest.raises(ValueError, match=r"spans: expected points of the history in each, got none in 'third' \(4.000 to 5.000 s\)"):
        plots.bytes_over_time(history, {"third": (4.0, 5.0)})


def test_threads_stand_in_rows_over_their_bytes() -> None:
    rows = {"reads": [("reading", 0.0, 0.001)], "computes": [("waiting", 0.0, 0.001), ("computing", 0.001, 0.003)]}
    colors = {"reading": "#111111", "waiting": "#222222", "computing": "#333333"}
    figure = plots.threads(rows, colors, [(0.0, 0), (0.001, 3_000_000)])
    above, below = figure.axes
    assert [label.get_text() for label in above.get_yticklabels()] == ["reads", "computes"]
    drawn = [path.get_extents().width for collection in above.collections for path in collection.get_paths()]
    assert sorted(drawn) == pytest.approx([1, 1, 2])
    assert below.lines[0].get_ydata().tolist() == [0, 3]


def test_blocks_are_separated_by_lines() -> None:
    figure = plots.block_grid(torch.randn(6, 8), {"rows": (1, 8), "squares": (3, 2)}, label="absolute weight")
    counts = [[len(lines.get_segments()) for lines in axes.collections] for axes in figure.axes[:2]]
    assert counts == [[5, 0], [1, 3]]


def test_outliers_are_counted() -> None:
    figure = plots.channel_peaks(torch.tensor([1.0, 6.0, 7.0, 2.0]), 6.0, "largest absolute value")
    assert {"outliers: 2 of 4", "below: 2 of 4", "threshold 6"} <= set(texts(figure))


def test_stairs_step_in_the_middle_between_two_levels() -> None:
    figure = plots.rounding_stairs({"three": [0.0, -1.0, 1.0]}, "before", "after")
    (stairs,) = figure.axes[0].patches
    assert list(stairs.get_data().edges) == [-1, -0.5, 0.5, 1]
    assert list(stairs.get_data().values) == [-1, 0, 1]
