"""Pictures of the autoencoder: what is drawn is what was given."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from flux_lab.autoencoder import DiagonalGaussianDistribution
from flux_lab.instruments import plots


def lines_of(figure: Figure) -> dict[str, list[float]]:
    (axes,) = figure.axes
    return {line.get_label(): [float(value) for value in line.get_ydata()] for line in axes.lines}


def assert_labelled(figure: Figure) -> None:
    assert figure.axes[0].get_xlabel()
    assert figure.axes[0].get_ylabel()


def test_feature_maps_show_the_channels_that_vary_most() -> None:
    features = torch.zeros(1, 3, 4, 5)
    features[0, 2, 0] = 7.0
    features[0, 1, :, 0] = 1.0
    figure = plots.feature_maps({"level 1": features, "level 2": features[:, :, :2]}, count=2)
    drawn = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert len(drawn) == 4
    assert drawn[0][0].min() == 255
    assert drawn[0][1:].max() == 0
    assert [text.get_text() for text in figure.texts] == ["level 1\n3 × 4 × 5", "level 2\n3 × 2 × 5"]


def test_small_grid_puts_every_image_in_its_place() -> None:
    red, lime = (Image.new("RGB", (4, 4), color) for color in ("red", "lime"))
    figure = plots.small_grid({"one": [red, lime], "two": [lime, red]}, ["left", "right"], cell=0.5)
    assert [int(axes.get_images()[0].get_array()[0, 0, 0]) for axes in figure.axes] == [255, 0, 0, 255]
    assert [axes.get_title() for axes in figure.axes] == ["left", "right", "", ""]
    tops = [round(axes.get_position().y1, 3) for axes in figure.axes]
    assert tops[0] == tops[1] > tops[2] == tops[3]


@pytest.mark.parametrize(("counts", "headings"), [((1, 2), ()), ((2, 2), ("one",)), ((0,), ()), ((), ())])
def test_small_grid_refuses_rows_of_different_length(counts: tuple[int, ...], headings: tuple[str, ...]) -> None:
    rows = {str(row): [Image.new("RGB", (4, 4))] * count for row, count in enumerate(counts)}
    with pytest.raises(ValueError, match="small_grid: expected rows and headings of one length"):
        plots.small_grid(rows, headings)


def test_large_map_is_published_as_a_photograph() -> None:
    large, small = torch.rand(64, 64), torch.rand(8, 8)
    assert plots.encoded(plots.heat_maps({"a": large}, "error"))[0] == "image/jpeg"
    assert plots.encoded(plots.heat_maps({"a": small}, "error"))[0] == "image/png"


def test_constant_feature_map_is_drawn() -> None:
    plots.png(plots.feature_maps({"flat": torch.ones(1, 2, 4, 4)}))


def test_level_sizes_draws_the_counts() -> None:
    figure = plots.level_sizes({"small": {"a": 10, "b": 20}, "large": {"a": 300, "b": 4000}})
    assert lines_of(figure) == {"small": [10, 20], "large": [300, 4000]}
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["a", "b"]


def test_posterior_spread_draws_both_deviations() -> None:
    mean, logvar = torch.randn(2, 3, 4, 5), torch.full((2, 3, 4, 5), -2.0)
    figure = plots.posterior_spread(DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)))
    of_means, of_posterior = lines_of(figure).values()
    assert of_means == pytest.approx([mean[:, channel].std().item() for channel in range(3)], rel=1e-5)
    assert of_posterior == pytest.approx([np.exp(-1)] * 3, rel=1e-5)
    assert_labelled(figure)


def test_histogram_is_a_density() -> None:
    figure = plots.histograms({"given": torch.tensor([-1.0, 1.0, 1.0, 9.0])}, xlabel="value", limit=4.0)
    drawn = lines_of(figure)
    step = 8 / len(drawn["given"])
    assert sum(drawn["given"]) * step == pytest.approx(0.75)  # one of the four lies outside
    assert sum(drawn["standard normal"]) * step == pytest.approx(1, abs=1e-3)
    assert "standard normal" not in lines_of(plots.histograms({"given": torch.zeros(3)}, xlabel="value", normal=False))
    assert_labelled(figure)


def test_difference_is_black_where_images_agree() -> None:
    first, second = Image.new("RGB", (4, 3), (10, 20, 30)), Image.new("RGB", (4, 3), (10, 25, 230))
    assert plots.difference(first, second, times=2).getpixel((0, 0)) == (0, 10, 255)
    with pytest.raises(ValueError, match=r"one size, got \(4, 3\) and \(2, 2\)"):
        plots.difference(first, first.resize((2, 2)))


def test_heat_maps_share_one_scale_from_zero() -> None:
    maps = {"a": torch.tensor([[0.0, 2.0]]), "b": torch.tensor([[1.0, 6.0]])}
    drawn = [axes.get_images()[0] for axes in plots.heat_maps(maps, "error").axes if axes.get_images()]
    assert [(image.norm.vmin, image.norm.vmax) for image in drawn] == [(0, 6)] * 2
    assert np.array_equal(drawn[1].get_array(), maps["b"].numpy())
    assert plots.heat_maps(maps, "error", highest=3.0).axes[0].get_images()[0].norm.vmax == 3


def test_contrast_kept_draws_the_shares() -> None:
    figure = plots.contrast_kept([1, 2, 4], {"gray": [0.1, 0.5, 1.0]})
    assert lines_of(figure)["gray"] == [0.1, 0.5, 1.0]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1", "2", "4"]
    assert_labelled(figure)


def test_seam_profile_peaks_at_the_seam() -> None:
    images = torch.zeros(1, 3, 4, 12)
    images[..., 6:] = 0.5
    steps = plots.neighbour_steps(images)
    assert steps.argmax() == 5
    assert steps[5] == 0.5
    figure = plots.seam_profile({"cut": images}, seam=6, around=3)
    assert lines_of(figure)["cut"] == [0, 0, 0.5, 0, 0, 0]
    assert_labelled(figure)
