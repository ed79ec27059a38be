"""The tiny random transformer and pipeline that the tests of the instruments look at."""

from pathlib import Path

from conftest import randomize_
from test_pipeline import KINDS, write_random

from flux_lab.config import TINY
from flux_lab.pipeline import FluxPipeline
from flux_lab.transformer import FluxTransformer2DModel


def make_model() -> FluxTransformer2DModel:
    return randomize_(FluxTransformer2DModel(TINY))


def make_pipe(folder: Path) -> FluxPipeline:
    """A pipeline like dev's, written into an empty folder and read from there."""
    write_random(folder, *KINDS["dev"])
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
