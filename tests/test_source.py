"""The listings of code: the right lines, with and without docstrings."""

import ast
import inspect

import pytest

from flux_lab import latents
from flux_lab.instruments import source
from flux_lab.instruments.source import Listing, without_docstrings
from flux_lab.latents import pack_latents
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler

SAMPLE = '''class Outer:
    """Doc of the class."""

    size = 3

    def first(self):
        """Doc of a method,
        on two lines.
        """
        # a comment stays
        return """not a docstring"""

    def second(self):
        """Nothing but this."""
'''


def test_listing_is_the_function_with_its_decorator() -> None:
    listing = source(pack_latents)
    assert listing.code.startswith("@shaped\ndef pack_latents(")
    assert "Cut latents into 2x2 patches" in listing.code
    lines = inspect.getsource(latents).splitlines()
    first, last = (int(word) for word in listing.place.split() if word.isdigit())
    assert listing.place.startswith("flux_lab/latents.py, lines ")
    assert lines[first - 1 : last] == listing.code.splitlines()


def test_method_is_moved_to_the_margin() -> None:
    listing = source(FlowMatchEulerDiscreteScheduler().step, docstring=False)
    assert listing.code.startswith("@shaped\ndef step(")
    assert '"""' not in listing.code
    assert "(sigma_next - sigma) * velocity" in listing.code
    ast.parse(listing.code)


def test_an_instance_stands_for_its_class() -> None:
    assert source(FlowMatchEulerDiscreteScheduler()) == source(FlowMatchEulerDiscreteScheduler)


def test_module_is_shown_whole() -> None:
    assert source(latents).code == inspect.getsource(latents).rstrip()
    assert source(latents).place == "flux_lab/latents.py"


def test_docstrings_are_dropped_and_nothing_else() -> None:
    short = without_docstrings(SAMPLE)
    assert "Doc of" not in short
    assert "# a comment stays" in short
    assert '"""not a docstring"""' in short
    assert '"""Nothing but this."""' in short
    assert short.splitlines()[:2] == ["class Outer:", "    size = 3"]
    ast.parse(short)


def test_markdown_survives_backticks() -> None:
    listing = source(test_markdown_survives_backticks)
    assert "```" in listing.code
    assert listing._repr_markdown_().splitlines()[3] == "````python"
    assert listing._repr_markdown_().splitlines()[-3] == "````"


def test_markdown_is_as_wide_as_the_code() -> None:
    assert '<div style="min-width: 62em">' in Listing("a" * 20 + "\n" + "b" * 100, "somewhere")._repr_markdown_()
    assert '<div style="min-width: 0em">' in Listing("", "somewhere")._repr_markdown_()


@pytest.mark.parametrize("thing", [len, 3, [1]])
def test_what_is_not_python_code_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match="source: expected a function, class or module written in Python"):
        source(thing)
