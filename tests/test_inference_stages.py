"""flux_lab.inference.stages: few blocks stand for all, and what is counted is what the whole model has."""

import dataclasses

import pytest
import torch

from flux_lab.checkpoints import empty_weights
from flux_lab.inference.hoisting import hoist
from flux_lab.inference.live_bytes import bytes_of
from flux_lab.inference.memory import plan
from flux_lab.inference.parts import MODELS
from flux_lab.inference.quantization import quantize
from flux_lab.inference.stages import SCHEME_OF_BITS, stored
from flux_lab.inference.streaming import blocks_of
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

# More blocks than the one that stands for all.
MINI = dataclasses.replace(MODELS["mini"], transformer=dataclasses.replace(MODELS["mini"].transformer, num_layers=3, num_single_layers=5))


def whole(kind, config, bits, passes=0):
    """The real number of blocks, on `meta`."""
    with empty_weights():
        model = kind(config).bfloat16()
        if passes:
            number = torch.empty(1).bfloat16()
            model = hoist(model, [(number, number, torch.empty(1, config.pooled_projection_dim).bfloat16())] * passes)
        return quantize(model, SCHEME_OF_BITS[bits]) if SCHEME_OF_BITS[bits] else model


@pytest.mark.slow
@pytest.mark.parametrize("hoisted", [True, False])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weights_are_those_of_the_whole_transformer(bits, hoisted):
    model = whole(FluxTransformer2DModel, MINI.transformer, bits, passes=3 * hoisted)
    made = plan(MINI, bits=bits, steps=3, hoisted=hoisted)
    assert made["denoise"].weights == bytes_of(model)
    blocks = [stored(block) for block in blocks_of(model).values()]
    streamed = plan(MINI, bits=bits, steps=3, hoisted=hoisted, stream=True)
    assert streamed["denoise"].weights == bytes_of(model) - sum(blocks) + 2 * max(blocks)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weights_are_those_of_the_whole_t5(bits):
    kept = plan(MINI, bits=16)["encode"].weights - bytes_of(whole(T5EncoderModel, MINI.text_encoder_2, 16))
    assert plan(MINI, bits=bits)["encode"].weights - kept == bytes_of(whole(T5EncoderModel, MINI.text_encoder_2, bits))


def test_one_step_more_is_one_row_of_the_tables_more():
    first, second, third = (plan(MINI, steps=steps)["denoise"].weights for steps in (1, 2, 3))
    assert third - second == second - first > 0
    assert plan(MINI, steps=2, negative=True)["denoise"].weights == first + 3 * (second - first)
