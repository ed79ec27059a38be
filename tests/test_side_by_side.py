"""instruments.side_by_side: shapes from the meta device are those of a run."""

import pytest
import torch
from conftest import randomize_
from test_instruments import TINY

from flux_lab.instruments import FLUX_1_DEV, MINIATURE
from flux_lab.instruments.side_by_side import as_deep_as, empty_inputs, side_by_side, trace_shapes
from flux_lab.instruments.trace import trace
from flux_lab.transformer import FluxTransformer2DModel


def test_shapes_on_meta_are_those_of_a_run():
    model = randomize_(FluxTransformer2DModel(TINY.transformer))
    inputs = {name: torch.rand(tensor.shape) for name, tensor in empty_inputs(TINY).items()}
    with trace(model, probabilities=True) as real:
        model(**inputs)
    empty = trace_shapes(TINY, probabilities=True)
    assert [(name, tensor.shape) for name, tensor in real.items()] == [(name, tensor.shape) for name, tensor in empty.items()]
    assert empty.axes == real.axes
    assert empty.bytes == 0
    assert empty.table().rows[0][-2:] == ["", ""]


def test_miniature_beside_flux_1_dev():
    table = side_by_side()
    assert list(table.header) == ["tensor", "axes", MINIATURE.name, FLUX_1_DEV.name]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["`double 00/attn/q`"] == ["batch sequence heads head_dim", (1, 96, 3, 32), (1, 4608, 24, 128)]
    assert rows["`single 00/mlp/hidden`"] == ["batch sequence hidden", (1, 96, 384), (1, 4608, 12288)]
    assert rows["`velocity`"] == ["batch tokens patch_channels", (1, 64, 64), (1, 4096, 64)]
    assert not any(name.startswith("`double 01") for name in rows)


def test_other_models_and_choices():
    dev = trace_shapes(FLUX_1_DEV, only=["double 18/*", "single 37/attn/*"], probabilities=True)
    assert dev["single 37/attn/probabilities"].shape == (1, 24, 4608, 4608)
    table = side_by_side(TINY, dev, only="*/attn/probabilities", probabilities=True, names=("tiny", "dev"))
    assert [row[0] for row in table.rows][:2] == ["`double 00/attn/probabilities`", "`double 01/attn/probabilities`"]
    assert [row[3] for row in table.rows][:1] == [""]
    with pytest.raises(ValueError, match="names: expected 1 headings, one for each anatomy, got 2"):
        side_by_side(TINY, names=("a", "b"))


@pytest.mark.parametrize(
    ("only", "depth"),
    [
        (None, (19, 38)),
        ("*/attn/q", (19, 38)),
        ("dou*q", (19, 1)),
        ("velocity", (1, 1)),
        (["double 00/*", "last/*"], (1, 1)),
        (["double 0?/image", "single 12/update"], (10, 13)),
    ],
)
def test_only_the_blocks_that_can_be_named_are_run(only, depth):
    network = as_deep_as(FLUX_1_DEV, only).transformer
    assert (network.num_layers, network.num_single_layers) == depth
    assert side_by_side(TINY, only=only).rows == side_by_side(trace_shapes(TINY), only=only, names=("tiny",)).rows
