"""The widget: one output that holds sliders and a still picture, controls that redraw, errors that can be read."""

import base64

import ipywidgets
import pytest
from PIL import Image

from flux_lab.instruments import explore
from flux_lab.instruments.explore import WIDGET


def draw(level=3, share=0.5, word="red", text="hello", flag=False):
    if word == "none":
        raise ValueError("no such <colour>")
    return Image.new("RGB", (40 + level, 20), (int(share * 200), 10 * len(text), 99 if flag else 0))


CONTROLS = {"level": (0, 9), "share": (0.0, 1.0, 0.25), "word": ["red", "none"], "text": str, "flag": bool}


def test_one_output_holds_the_view_the_picture_and_a_text() -> None:
    explorer = explore(draw, alt="a red rectangle", **CONTROLS)
    data, metadata = explorer._repr_mimebundle_()
    assert set(data) == {WIDGET, "image/jpeg", "text/plain"}
    assert data[WIDGET]["model_id"] == explorer.view.model_id
    assert base64.b64decode(data["image/jpeg"]) == explorer.image.value
    assert data["text/plain"] == "a red rectangle"
    assert metadata == {"image/jpeg": {"alt": "a red rectangle"}}
    assert (explorer.image.width, explorer.image.format) == ("43", "jpeg")


def test_controls_start_at_the_defaults_and_fit_their_kind() -> None:
    explorer = explore(draw, alt="a red rectangle", **CONTROLS)
    assert explorer.values == {"level": 3, "share": 0.5, "word": "red", "text": "hello", "flag": False}
    kinds = [ipywidgets.IntSlider, ipywidgets.FloatSlider, ipywidgets.Dropdown, ipywidgets.Text, ipywidgets.Checkbox]
    assert [type(control) for control in explorer.controls.values()] == kinds
    share = explorer.controls["share"]
    assert (share.min, share.max, share.step, share.continuous_update) == (0.0, 1.0, 0.25, False)


@pytest.mark.parametrize(
    ("choices", "labels"),
    [(["red", "none"], ("red", "none")), ([(64, 64), (128, 96)], ("(64, 64)", "(128, 96)")), ([1, None], ("1", "None"))],
)
def test_anything_can_be_chosen_from_a_list(choices: list, labels: tuple[str, ...]) -> None:
    def picture(choice: object = choices[0]) -> Image.Image:
        return Image.new("RGB", (20 + choices.index(choice), 20))

    explorer = explore(picture, alt="a black rectangle", choice=choices)
    control = explorer.controls["choice"]
    assert control._options_labels == labels
    control.index = 1
    assert explorer.values == {"choice": choices[1]}


@pytest.mark.parametrize(
    ("bounds", "step", "readout"),
    [
        ((0.0, 0.01), 0.0001, ".4f"),
        ((0.0, 0.01, 0.002), 0.002, ".3f"),
        ((0.0, 1.0), 0.01, ".2f"),
        ((-3, 3.0), 0.1, ".2f"),
        ((0.0, 500.0), 0.1, ".2f"),
        ((0.0, 0.0), 0.1, ".2f"),
    ],
)
def test_a_small_range_has_places_that_can_be_told_apart(bounds: tuple[float, ...], step: float, readout: str) -> None:
    def picture(share: float = 0.0) -> Image.Image:
        return Image.new("RGB", (20, 20))

    share = explore(picture, alt="a black square", share=bounds).controls["share"]
    assert (share.step, share.readout_format) == (step, readout)


@pytest.mark.parametrize(("name", "value"), [("level", 4), ("share", 0.75), ("text", "bye"), ("flag", True)])
def test_moving_a_control_redraws_and_keeps_the_still(name: str, value: object) -> None:
    explorer = explore(draw, alt="a red rectangle", **CONTROLS)
    before = explorer.image.value
    explorer.controls[name].value = value
    assert explorer.image.value != before
    assert explorer.still == before
    assert explorer.status.value == ""


def test_error_is_shown_and_still_raised() -> None:
    explorer = explore(draw, alt="a red rectangle", **CONTROLS)
    before = explorer.image.value
    with pytest.raises(ValueError, match="no such"):
        explorer.controls["word"].value = "none"
    assert explorer.status.value == "<b>ValueError</b>: no such &lt;colour&gt;"
    assert explorer.image.value == before
    explorer.controls["word"].value = "red"
    assert explorer.status.value == ""


@pytest.mark.parametrize(
    ("controls", "error", "message"),
    [
        ({"nothing": (0, 1)}, TypeError, "nothing: expected the name of an argument of `draw`"),
        ({"level": (5, 9)}, ValueError, "level: its default 3 is not between 5 and 9"),
        ({"word": ["blue"]}, ValueError, "word: its default 'red' is not in the list"),
        ({"level": (1,)}, TypeError, "level: expected .lowest, highest."),
        ({"alt": " "}, ValueError, "alt: expected a sentence"),
    ],
)
def test_control_that_does_not_fit_is_refused(controls: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explore(draw, **{"alt": "a red rectangle", **controls})
