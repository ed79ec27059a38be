"""Looking at a pipeline from outside. Nothing here changes what a model computes."""

from flux_lab.instruments import plots
from flux_lab.instruments.anatomy import FLUX_1_DEV, MINIATURE, Anatomy, anatomy_of
from flux_lab.instruments.budget import budget, on_meta, parameter_counts
from flux_lab.instruments.config_table import config_table, model_index
from flux_lab.instruments.explore import explore
from flux_lab.instruments.plots import show
from flux_lab.instruments.source import source
from flux_lab.instruments.table import Table

__all__ = [
    "FLUX_1_DEV",
    "MINIATURE",
    "Anatomy",
    "Table",
    "anatomy_of",
    "budget",
    "config_table",
    "explore",
    "model_index",
    "on_meta",
    "parameter_counts",
    "plots",
    "show",
    "source",
]
