"""One function for every kind of picture. Each returns a matplotlib figure; `show` puts it into the notebook together with its alt text.

`pictures` holds those that every lesson uses; each further module holds those of one subject.
"""

from flux_lab.instruments.pipeline_map import STAGES, pipeline_map
from flux_lab.instruments.plots.all_blocks import block_bars, block_sheet
from flux_lab.instruments.plots.attention import attention_matrix, attention_shares, word_maps
from flux_lab.instruments.plots.autoencoder import (
    contrast_kept,
    difference,
    feature_maps,
    heat_maps,
    histograms,
    level_sizes,
    neighbour_steps,
    posterior_spread,
    seam_profile,
    small_grid,
)
from flux_lab.instruments.plots.budget import growth, stacked_bars
from flux_lab.instruments.plots.diffusion import signal_to_noise, timestep_strip, timestep_ticks
from flux_lab.instruments.plots.loop import lines, seed_dots, strength_map
from flux_lab.instruments.plots.memory import block_grid, bytes_over_time, channel_peaks, code_books, rounding_stairs, threads
from flux_lab.instruments.plots.modulation import channel_map, lengths, likeness, modulation_map, rounding_errors, sinusoids, token_maps
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
from flux_lab.instruments.plots.rope import frequency_ladders, place_maps, rotation_table, rounding, score_curves, turning_pair
from flux_lab.instruments.plots.schedule import convergence, level_paths, mu_line, schedules, shift_curves
from flux_lab.instruments.plots.speed import Roof, predictions, ratio_bars, roofline
from flux_lab.instruments.plots.text import bpe_ladder, drawable, grouped_bars, slot_grid, token_strips, unigram_lattice
from flux_lab.instruments.plots.text_encoders import curves, labelled_map, position_bias
from flux_lab.instruments.plots.tokens import id_maps, packing, token_orders
from flux_lab.instruments.plots.unet import Stage, depth_profile, seam_bars
from flux_lab.instruments.plots.walk import curves_by_block, stop_here, walk_curves

__all__ = [
    "MARKERS",
    "STAGES",
    "Roof",
    "Stage",
    "attention_matrix",
    "attention_shares",
    "block_bars",
    "block_grid",
    "block_sheet",
    "bpe_ladder",
    "bytes_over_time",
    "channel_map",
    "channel_peaks",
    "chart",
    "code_books",
    "contrast_kept",
    "convergence",
    "curves",
    "curves_by_block",
    "depth_profile",
    "difference",
    "drawable",
    "encoded",
    "feature_maps",
    "film_strip",
    "frequency_ladders",
    "gallery",
    "grouped_bars",
    "growth",
    "heat_maps",
    "histograms",
    "id_maps",
    "image_grid",
    "labelled_map",
    "latent_channels",
    "lengths",
    "level_paths",
    "level_sizes",
    "likeness",
    "lines",
    "modulation_map",
    "mu_line",
    "neighbour_steps",
    "packing",
    "parameter_bars",
    "pipeline_map",
    "place_maps",
    "png",
    "position_bias",
    "posterior_spread",
    "predictions",
    "ratio_bars",
    "roofline",
    "rotation_table",
    "rounding",
    "rounding_errors",
    "rounding_stairs",
    "schedules",
    "score_curves",
    "seam_bars",
    "seam_profile",
    "seed_dots",
    "shift_curves",
    "show",
    "sigma_curve",
    "signal_to_noise",
    "sinusoids",
    "slot_grid",
    "small_grid",
    "stacked_bars",
    "stop_here",
    "strength_map",
    "threads",
    "timestep_strip",
    "timestep_ticks",
    "token_maps",
    "token_orders",
    "token_strips",
    "turning_pair",
    "unigram_lattice",
    "walk_curves",
    "word_maps",
]
