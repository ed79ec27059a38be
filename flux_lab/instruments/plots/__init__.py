"""One function for every kind of picture. Each returns a matplotlib figure; `show` puts it into the notebook together with its alt text.

`pictures` holds those that every lesson uses; each further module holds those of one subject.
"""

from flux_lab.instruments.pipeline_map import STAGES, pipeline_map
from flux_lab.instruments.plots.pictures import (
    MARKERS,
    chart,
    encoded,
    film_strip,
    gallery,
    image_grid,
    latent_channels,
    parameter_bars,
    png,
    show,
    sigma_curve,
)

__all__ = [
    "MARKERS",
    "STAGES",
    "chart",
    "encoded",
    "film_strip",
    "gallery",
    "image_grid",
    "latent_channels",
    "parameter_bars",
    "pipeline_map",
    "png",
    "show",
    "sigma_curve",
]
