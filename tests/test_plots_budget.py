"""Pictures of budgets and of all blocks."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from flux_lab.instruments import plots
from flux_lab.instruments.plots.budget import part_colors
from flux_lab.instruments.style import BLUE, INK, VERMILLION

BLOCKS = {"double 00": 0.25, "double 01": 0.0, "single 00": 0.5, "single 01": 0.125}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_shares_are_percent_of_each_row() -> None:
    figure = plots.stacked_bars({"small": {"a": 1, "b": 3}, "large": {"a": 600, "b": 200, "c": 200}}, xlabel="share", share=True)
    (axes,) = figure.axes
    widths = [round(patch.get_width(), 6) for patch in axes.patches if patch.get_width()]
    assert widths == [25, 75, 60, 20, 20]
    assert {"25 %", "75 %", "60 %", "20 %", "small", "large"} <= set(texts(figure))


def test_bars_stand_end_to_end_and_marks_where_they_belong() -> None:
    figure = plots.stacked_bars({"one": {"a": 2.0, "b": 0.0, "c": 6.0}}, xlabel="GB", marks={"a card of 4 GB": 4})
    (axes,) = figure.axes
    assert [(patch.get_x(), patch.get_width()) for patch in axes.patches if patch.get_width()] == [(0, 2), (2, 6)]
    assert axes.lines[0].get_xdata() == [4, 4]
    assert axes.get_xlabel() == "GB"


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        plots.stacked_bars({}, xlabel="GB")
    with pytest.raises(ValueError, match=r"got the sums \{'one': 0\}"):
        plots.stacked_bars({"one": {"a": 0}}, xlabel="GB")


def test_colours_of_many_parts_differ() -> None:
    colors = part_colors([str(part) for part in range(12)])
    assert len(set(colors.values())) == 12


def test_parts_that_are_alike_share_a_colour_of_two_strengths() -> None:
    colors = part_colors(["double: MLP", "double: attention", "single: MLP"])
    assert colors["single: MLP"] == pytest.approx(tuple((1 + value) / 2 for value in colors["double: MLP"]))
    assert colors["double: attention"] not in (colors["double: MLP"], colors["single: MLP"])


def test_growth_has_a_tick_at_every_size() -> None:
    figure = plots.growth({"linear": {1: 2.0, 2: 4.0}, "square": {1: 1.0, 4: 16.0}}, xlabel="pixels", ylabel="TFLOP")
    (axes,) = figure.axes
    assert list(axes.get_xticks()) == [1, 2, 4]
    assert axes.get_ylim()[0] == 0


def test_every_block_has_a_bar_in_the_colour_of_its_kind() -> None:
    figure = plots.block_bars({"change": BLOCKS, "gate": dict.fromkeys(BLOCKS, 1.0)})
    change, gate = figure.axes
    assert [patch.get_height() for patch in change.patches] == list(BLOCKS.values())
    assert [axes.get_ylabel() for axes in (change, gate)] == ["change", "gate"]
    assert {"single 00", "double-stream blocks", "single-stream blocks"} <= {text.get_text() for text in change.texts}


def test_block_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected blocks named like 'double 07' or 'single 30', got 'block 1'"):
        plots.block_bars({"change": {"block 1": 1.0}})


def test_sheet_has_an_image_for_every_name() -> None:
    names = ["all blocks", *(f"double {index:02d}" for index in range(6)), *(f"single {index:02d}" for index in range(5))]
    figure = plots.block_sheet({name: Image.new("RGB", (8, 8)) for name in names})
    assert [axes.get_title() for axes in figure.axes] == names
    colors = [axes.title.get_color() for axes in figure.axes]
    assert (colors[0], colors[1], colors[-1]) == (INK, BLUE, VERMILLION)
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1 for box in boxes)
