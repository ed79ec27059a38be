"""Pictures of a UNet: what is drawn is what was given."""

import pytest

from flux_lab.instruments import plots
from flux_lab.instruments.plots import Stage

STAGES = [Stage("in", 8, 16), Stage("down", 8, 16), Stage("halved", 8, 8), Stage("mid", 24, 8), Stage("up", 8, 16)]


def test_depth_profile_draws_a_bar_for_each_stage() -> None:
    figure = plots.depth_profile({"UNet": STAGES, "flat": [Stage(f"block {i}", 96, 8) for i in range(40)]})
    unet, flat = figure.axes
    assert [bar.get_height() for bar in unet.patches] == [16, 16, 8, 8, 16]
    shades = [sum(bar.get_facecolor()[:3]) for bar in unet.patches]
    assert sum(flat.patches[0].get_facecolor()[:3]) < shades[3] < shades[0] == shades[1] == shades[2] == shades[4]
    assert [text.get_text() for text in unet.texts] == ["8", "8", "8", "24", "8"]
    assert [label.get_text() for label in unet.get_yticklabels()] == ["8 × 8", "16 × 16"]
    assert [text.get_text() for text in flat.texts] == ["96", "96"]
    assert len(flat.patches) == 40
    plots.png(figure)


def test_depth_profile_brackets_lead_from_stage_to_stage() -> None:
    (axes,) = plots.depth_profile({"UNet": STAGES}, {"UNet": [(0, 4), (1, 4), (2, 3)]}).axes
    ends = {(int(line.get_xdata()[0]), int(line.get_xdata()[-1])): line.get_ydata()[1] for line in axes.lines}
    assert set(ends) == {(0, 4), (1, 4), (2, 3)}
    assert ends[0, 4] > ends[1, 4] > 16 > ends[2, 3] > 8


def test_seam_bars_draw_every_group() -> None:
    (axes,) = plots.seam_bars({"off": {"skip 0": 0.5, "mid": 0.25}, "doubled": {"skip 0": 1.0, "mid": 2.0}}, ylabel="change").axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.25, 1.0, 2.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["skip 0", "mid"]
    with pytest.raises(ValueError, match="seam_bars: expected the same seams"):
        plots.seam_bars({"a": {"x": 1.0}, "b": {"y": 1.0}}, ylabel="change")
