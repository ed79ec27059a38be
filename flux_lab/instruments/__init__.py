"""Looking at a pipeline from outside. Nothing here changes what a model computes."""

from flux_lab.instruments import compare, plots
from flux_lab.instruments.ablate import ablate
from flux_lab.instruments.anatomy import FLUX_1_DEV, MINIATURE, Anatomy, anatomy_of
from flux_lab.instruments.budget import budget, on_meta, parameter_counts
from flux_lab.instruments.config_table import config_table, model_index
from flux_lab.instruments.explore import explore
from flux_lab.instruments.latent_rgb import latent_rgb_factors, latents_as_rgb
from flux_lab.instruments.plots import show
from flux_lab.instruments.side_by_side import side_by_side, trace_shapes
from flux_lab.instruments.source import source
from flux_lab.instruments.table import Table
from flux_lab.instruments.trace import trace

__all__ = [
    "FLUX_1_DEV",
    "MINIATURE",
    "Anatomy",
    "Table",
    "ablate",
    "anatomy_of",
    "budget",
    "compare",
    "config_table",
    "explore",
    "latent_rgb_factors",
    "latents_as_rgb",
    "model_index",
    "on_meta",
    "parameter_counts",
    "plots",
    "show",
    "side_by_side",
    "source",
    "trace",
    "trace_shapes",
]
