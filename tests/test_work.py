"""instruments.work: what is counted, by hand and against the counter over a whole model."""

import dataclasses

import pytest
import torch
from test_instruments import TINY
from torch.utils.flop_counter import FlopCounterMode

from flux_lab.exercises.transformer import attention_product_flops, double_block_parameters
from flux_lab.instruments import FLUX_1_DEV, MINIATURE, on_meta, parameter_counts
from flux_lab.instruments.side_by_side import empty_inputs
from flux_lab.instruments.work import (
    FLUX_1_SCHNELL,
    TRANSFORMER_PARTS,
    at_size,
    flops_by_part,
    parameters_by_part,
    part_of,
    pipeline_flops,
)

ANATOMIES = pytest.mark.parametrize("anatomy", [TINY, MINIATURE, FLUX_1_DEV, FLUX_1_SCHNELL], ids=lambda anatomy: anatomy.name)


@ANATOMIES
def test_parts_make_up_the_whole(anatomy) -> None:
    assert sum(parameters_by_part(anatomy).values()) == parameter_counts(anatomy)["transformer"]
    assert parameters_by_part(anatomy)["attention product"] == 0


@pytest.mark.parametrize("anatomy", [TINY, MINIATURE], ids=lambda anatomy: anatomy.name)
def test_one_block_of_each_kind_is_enough_to_count_flops(anatomy) -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta("transformer", anatomy)(**empty_inputs(anatomy))
    assert sum(flops_by_part(anatomy).values()) == counter.get_total_flops()


@ANATOMIES
def test_flops_are_those_of_the_formulas(anatomy) -> None:
    network, flops = anatomy.transformer, flops_by_part(anatomy)
    blocks = network.num_layers + network.num_single_layers
    assert flops["attention product"] == blocks * attention_product_flops(anatomy.tokens, anatomy.length, network.inner_dim)
    sequence, dim = anatomy.tokens + anatomy.length, network.inner_dim
    assert flops["double: MLP"] == network.num_layers * sequence * 16 * dim**2
    # One vector a block, whatever the size of the picture.
    assert flops["double: modulation"] == network.num_layers * 2 * 12 * dim**2


def test_numbers_of_flux_1() -> None:
    dev = parameters_by_part(FLUX_1_DEV)
    double = sum(count for part, count in dev.items() if part.startswith("double"))
    assert double == 19 * double_block_parameters(3072, 128)
    assert sum(flops_by_part(FLUX_1_DEV).values()) == 74_384_653_418_496
    assert parameter_counts(FLUX_1_SCHNELL)["transformer"] == 11_891_178_560


def test_size_of_the_picture() -> None:
    smaller = at_size(FLUX_1_DEV, 512)
    assert smaller.tokens == 1024
    assert flops_by_part(smaller)["conditioning"] == flops_by_part(FLUX_1_DEV)["conditioning"]
    assert flops_by_part(smaller)["attention product"] * 9 == flops_by_part(FLUX_1_DEV)["attention product"]
    with pytest.raises(ValueError, match="pixels: expected a multiple of 16, got 1000"):
        at_size(FLUX_1_DEV, 1000)


def test_pipeline() -> None:
    flops = pipeline_flops(TINY)
    assert list(flops) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert all(flops.values())
    assert flops["transformer"] == sum(flops_by_part(TINY).values())
    longer = dataclasses.replace(TINY, length=2 * TINY.length)
    assert pipeline_flops(longer)["text_encoder_2"] > flops["text_encoder_2"]
    assert pipeline_flops(longer)["text_encoder"] == flops["text_encoder"]


def test_every_part_has_parameters_or_work() -> None:
    for counts in (parameters_by_part(TINY), flops_by_part(TINY)):
        assert list(counts) == list(TRANSFORMER_PARTS)
    assert all(parameters_by_part(TINY)[part] or flops_by_part(TINY)[part] for part in TRANSFORMER_PARTS)


@pytest.mark.parametrize("path", ["vae", "transformer_blocks", "single_transformer_blocks.0.act_mlp"])
def test_path_of_no_part_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"path: expected a module or parameter of FLUX's transformer, got '{path}'"):
        part_of(path)
