"""The pictures: what is drawn, what is refused, and that a picture always travels with its alt text."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from flux_lab.instruments import plots
from flux_lab.instruments.anatomy import FLUX_1_DEV, MINIATURE
from flux_lab.instruments.pipeline_map import ARROWS, BOXES
from flux_lab.instruments.style import CYCLE, WIDTH
from flux_lab.shapes import ShapeError

RED, GREEN = (Image.new("RGB", (12, 8), color) for color in ("red", "lime"))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(plots.png(figure))).convert("RGB"))


# ---- the map ------------------------------------------------------------------------------------------------------------


def lit_labels(figure: Figure) -> set[str]:
    (axes,) = figure.axes
    return {text.get_text() for text in axes.texts if text.get_weight() == "bold"} - {""}


def test_map_names_every_part_and_every_shape() -> None:
    written = texts(plots.pipeline_map())
    assert {box.label for box in BOXES.values()} <= set(written)
    for anatomy in (MINIATURE, FLUX_1_DEV):
        assert {str(list(anatomy.shapes()[arrow.tensor])) for arrow in ARROWS if arrow.tensor} <= set(written)


def test_every_box_is_reached_by_an_arrow() -> None:
    inside = {"conditioning", "rope", "double", "single", "transformer"}
    assert {name for arrow in ARROWS for name in arrow.boxes} | inside == set(BOXES)


def test_every_text_of_the_map_lies_inside_it() -> None:
    figure = plots.pipeline_map()
    pixels(figure)
    (axes,) = figure.axes
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text


def test_no_two_texts_of_the_map_overlap() -> None:
    figure = plots.pipeline_map()
    pixels(figure)
    (axes,) = figure.axes
    extents = [(text.get_text(), text.get_window_extent()) for text in axes.texts if text.get_text()]
    clashes = [(a, b) for i, (a, first) in enumerate(extents) for b, second in extents[i + 1 :] if first.overlaps(second)]
    assert clashes == []


@pytest.mark.parametrize("stage", plots.STAGES)
def test_stage_is_lit_alone(stage: str) -> None:
    notes = lit_labels(plots.pipeline_map())
    expected = {BOXES[name].label for name in plots.STAGES[stage]} - {""}
    assert lit_labels(plots.pipeline_map(stage)) - notes == expected


def test_map_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"stage: expected None or one of .*'vae'.*, got 'vea'"):
        plots.pipeline_map("vea")
    with pytest.raises(ValueError, match="shapes: expected one or two anatomies, got 0"):
        plots.pipeline_map(shapes=())


# ---- images -------------------------------------------------------------------------------------------------------------


def test_grid_puts_every_image_in_its_place() -> None:
    figure = plots.image_grid({"one": [RED, GREEN], "two": [GREEN, RED]}, ["left", "right"])
    assert [axes.get_images()[0].get_array()[0, 0, 0] > 0 for axes in figure.axes] == [True, False, False, True]
    assert {"one", "two", "left", "right"} <= set(texts(figure))
    tops = [round(axes.get_position().y1, 3) for axes in figure.axes]
    assert tops[0] == tops[1] > tops[2] == tops[3]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_grid_is_no_wider_than_a_notebook(count: int) -> None:
    assert plots.image_grid({"": [RED] * count}).get_figwidth() <= WIDTH + 1e-6


@pytest.mark.parametrize(
    ("rows", "columns"), [({"a": [RED], "b": [RED, RED]}, ()), ({"a": [RED, RED]}, ["only one"]), ({}, ()), ({"a": []}, ())]
)
def test_grid_refuses_rows_of_different_length(rows: dict, columns: list[str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        plots.image_grid(rows, columns)


def test_film_strip_shows_both_rows_and_the_noise_levels() -> None:
    picture = {"latents": RED, "x0": GREEN}
    states = (SimpleNamespace(index=index, sigma=1 - index / 2, sigma_next=0.5 - index / 2, image=picture.get) for index in range(2))
    figure = plots.film_strip(states)
    assert [tuple(axes.get_images()[0].get_array()[0, 0]) for axes in figure.axes] == [(255, 0, 0)] * 2 + [(0, 255, 0)] * 2
    assert {"step 1\nσ 1.00 → 0.50", "step 2\nσ 0.50 → 0.00"} <= set(texts(figure))


def test_latent_channels_share_one_scale_around_zero() -> None:
    latents = torch.linspace(-3, 2, 2 * 10 * 4 * 6).reshape(2, 10, 4, 6)
    drawn = [axes.get_images()[0] for axes in plots.latent_channels(latents).axes if axes.get_images()]
    assert len(drawn) == 10
    assert {(-image.norm.vmin, image.norm.vmax) for image in drawn} == {(latents[0].abs().max().item(),) * 2}
    assert np.array_equal(drawn[7].get_array(), latents[0, 7].numpy())


def test_latent_channels_refuses_packed_tokens() -> None:
    with pytest.raises(ShapeError, match=r"latent_channels: argument `latents`.*got float32 \[1, 64, 64\]"):
        plots.latent_channels(torch.zeros(1, 64, 64))


# ---- curves and bars ----------------------------------------------------------------------------------------------------


def test_sigma_curve_draws_the_values() -> None:
    (axes,) = plots.sigma_curve({"a": [1.0, 0.5, 0.0], "b": torch.tensor([1.0, 0.0])}).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 0.5, 0.0], [1.0, 0.0]]
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_parameter_bars_are_as_long_as_the_counts() -> None:
    (axes,) = plots.parameter_bars({"small": {"vae": 10, "t5": 200}, "large": {"vae": 3000, "t5": 40_000}}).axes
    assert sorted(bar.get_width() for bar in axes.patches) == [10, 200, 3000, 40_000]
    assert "40,000" in texts(axes.figure)


def test_every_curve_has_a_color_and_a_marker_of_its_own() -> None:
    assert len(set(CYCLE)) == len(set(plots.MARKERS[: len(CYCLE)])) == len(CYCLE)


# ---- publishing ---------------------------------------------------------------------------------------------------------


PHOTO, CHART = RED, plots.sigma_curve({"a": [1.0, 0.0]})


@pytest.mark.parametrize(("picture", "mime"), [(PHOTO, "image/jpeg"), (plots.gallery([RED]), "image/jpeg"), (CHART, "image/png")])
def test_show_publishes_picture_and_alt_text_as_one_output(monkeypatch: pytest.MonkeyPatch, picture: object, mime: str) -> None:
    published = []
    monkeypatch.setattr(plots.pictures, "display", lambda data, **options: published.append((data, options)))
    plots.show(picture, alt="a description")
    ((data, options),) = published
    assert list(data) == [mime, "text/plain"]
    assert Image.open(io.BytesIO(base64.b64decode(data[mime]))).get_format_mimetype() == mime
    assert data["text/plain"] == "a description"
    assert options == {"metadata": {mime: {"alt": "a description"}}, "raw": True}


def test_small_file_looks_like_the_figure() -> None:
    for figure in (CHART, plots.gallery([RED, GREEN]), plots.pipeline_map()):
        small = np.asarray(Image.open(io.BytesIO(plots.encoded(figure)[1])).convert("RGB"), dtype=int)
        assert np.abs(small - pixels(figure)).mean() < 2


def test_rare_colours_stay_true():
    """A thousand light colours fill the picture, twenty dark ones stand in its last row."""
    colours = np.full((200, 200, 3), 255, dtype=np.uint8)
    colours[..., :2] -= np.random.default_rng(0).integers(0, 32, (200, 200, 2), dtype=np.uint8)
    colours[-1, :20] = np.linspace((0, 0, 160), (160, 0, 0), 20)
    off = [
        np.abs(np.asarray(small.convert("RGB"), dtype=int) - colours).max()
        for small in (Image.fromarray(colours).quantize(256), plots.pictures.with_palette(Image.fromarray(colours)))
    ]
    assert off[0] > 40
    assert off[1] <= 16


def test_show_refuses_a_picture_without_alt_text() -> None:
    with pytest.raises(ValueError, match="alt: expected a sentence"):
        plots.show(RED, alt=" ")


def test_png_is_the_same_at_every_build() -> None:
    assert plots.png(plots.gallery([RED])) == plots.png(plots.gallery([RED]))
    with pytest.raises(TypeError, match="picture: expected a matplotlib figure or a PIL image, got str"):
        plots.png("a picture")
