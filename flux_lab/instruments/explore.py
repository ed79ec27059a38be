"""Live sliders where a kernel runs, a still picture everywhere else: one output holds both."""

import base64
import html
import inspect
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

from flux_lab.instruments.plots import encoded

WIDGET = "application/vnd.jupyter.widget-view+json"
CALM = {"continuous_update": False, "style": {"description_width": "6em"}, "layout": ipywidgets.Layout(width="34em")}


class Explorer:
    """Controls above a picture that follows them. As the last line of a cell it shows itself."""

    def __init__(self, draw: Callable[..., Figure | Image.Image], alt: str, controls: dict[str, ipywidgets.Widget]):
        self.draw, self.alt, self.controls = draw, alt, controls
        self.mime, self.still = encoded(draw(**self.values))
        width = Image.open(io.BytesIO(self.still)).width
        # A picture wider than the page shrinks with it.
        self.image = ipywidgets.Image(
            value=self.still, format=self.mime.removeprefix("image/"), width=width, layout=ipywidgets.Layout(max_width="100%")
        )
        self.status = ipywidgets.HTML()
        self.view = ipywidgets.VBox([*controls.values(), self.status, self.image])
        for control in controls.values():
            control.observe(self._redraw, "value")

    @property
    def values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def _redraw(self, change: Any) -> None:
        with self._telling():
            mime, self.image.value = encoded(self.draw(**self.values))
            self.image.format = mime.removeprefix("image/")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Say that the picture is being drawn, and why it could not be."""
        self.status.value = "drawing …"
        try:
            yield
        except Exception as error:
            # Jupyter hides errors of a widget in a log; here they can be read, and a test still sees them.
            self.status.value = f"<b>{type(error).__name__}</b>: {html.escape(str(error))}"
            raise
        self.status.value = ""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The view of the widget, the picture of its first values, and a text, as one output."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.view.model_id}
        still = base64.b64encode(self.still).decode()
        return {WIDGET: view, self.mime: still, "text/plain": self.alt}, {self.mime: {"alt": self.alt}}


def explore(draw: Callable[..., Figure | Image.Image], *, alt: str, **controls: Any) -> Explorer:
    """Redraw `draw(**values)` whenever a control is moved.

    Each control has the name of an argument of `draw` and starts at that argument's default. It is a slider for (lowest, highest) or
    (lowest, highest, step), with whole numbers if all of them are, else in steps of 0.1 or, over a small range, of a smaller power of
    ten; a list to choose from for a list; a line of text for `str`; a tick box for `bool`. `alt` describes the picture of the
    defaults. Raises TypeError or ValueError for a control that does not fit.
    """
    if not alt.strip():
        raise ValueError("alt: expected a sentence that says what is to be seen, got an empty string")
    parameters = inspect.signature(draw).parameters
    for name in controls:
        if name not in parameters or parameters[name].default is inspect.Parameter.empty:
            raise TypeError(
                f"{name}: expected the name of an argument of `{draw.__name__}` that has a default; it takes {list(parameters)}"
            )
    return Explorer(draw, alt, {name: _control(name, kind, parameters[name].default) for name, kind in controls.items()})


def _control(name: str, kind: Any, value: Any) -> ipywidgets.Widget:
    named = {"description": name.replace("_", " "), "value": value}
    if kind is str:
        return ipywidgets.Text(**named, **CALM)
    if kind is bool:
        return ipywidgets.Checkbox(**named)
    if isinstance(kind, list):
        if value not in kind:
            raise ValueError(f"{name}: its default {value!r} is not in the list {kind}")
        # With labels of our own, as ipywidgets would take pairs for (label, value).
        return ipywidgets.Dropdown(options=[(str(each), each) for each in kind], **named, style=CALM["style"], layout=CALM["layout"])
    if isinstance(kind, tuple) and len(kind) in (2, 3) and all(isinstance(bound, int | float) for bound in kind):
        if not kind[0] <= value <= kind[1]:
            raise ValueError(f"{name}: its default {value!r} is not between {kind[0]} and {kind[1]}")
        whole = all(isinstance(number, int) for number in (*kind, value))
        slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        step = kind[2] if len(kind) == 3 else 1 if whole else _fine_step(*kind)
        # By itself ipywidgets shows two decimals.
        readout = {"readout_format": f".{-math.floor(math.log10(step))}f"} if 0 < step < 0.01 else {}
        return slider(min=kind[0], max=kind[1], step=step, **readout, **named, **CALM)
    raise TypeError(f"{name}: expected (lowest, highest), (lowest, highest, step), a list, str or bool, got {kind!r}")


def _fine_step(lowest: float, highest: float) -> float:
    """The power of ten that makes about 100 places, but at most 0.1."""
    return min(0.1, 10.0 ** round(math.log10((highest - lowest) / 100))) if highest > lowest else 0.1
