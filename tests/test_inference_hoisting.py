"""flux_lab.inference.hoisting: without modulation weights, and the same to the last bit."""

import dataclasses

import pytest
import torch
from conftest import randomize_
from test_pipeline import CASES, KINDS, SETTINGS, seeded, write_random
from test_transformer import make_inputs

from flux_lab.checkpoints import empty_weights
from flux_lab.config import FLUX_DEV, TINY
from flux_lab.inference.hoisting import hoist, modulation_linears, rehearse
from flux_lab.inference.live_bytes import bytes_of
from flux_lab.pipeline import FluxPipeline
from flux_lab.transformer import TIME_SCALE, FluxTransformer2DModel

CONFIGS = {"dev": TINY, "schnell": dataclasses.replace(TINY, guidance_embeds=False)}


def conditioning_of(inputs):
    numbers = [inputs[name].to(inputs["hidden_states"].dtype) * TIME_SCALE for name in ("timestep", "guidance") if inputs[name] is not None]
    return (*numbers, inputs["pooled_projections"])


def make(config, dtype=torch.float32):
    """A model, and the inputs of three passes."""
    model = randomize_(FluxTransformer2DModel(config)).to(dtype)
    passes = [make_inputs(config, dtype) | {"timestep": torch.tensor([time, time], dtype=dtype)} for time in (1.0, 0.6, 0.2)]
    return model, passes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_bit_for_bit(config, dtype):
    model, passes = make(config, dtype)
    hoisted = hoist(model, [conditioning_of(inputs) for inputs in passes])
    for inputs in [*passes, *reversed(passes)]:
        assert torch.equal(hoisted(**inputs), model(**inputs))


def test_modulation_weights_are_gone_and_all_others_shared():
    model, passes = make(TINY)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    hoisted = hoist(model, [conditioning_of(inputs) for inputs in passes])
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before, "the model given is left as it is"
    dropped = tuple(f"{name}." for name in [*modulation_linears(model), "time_text_embed"])
    kept = {name: pointer for name, pointer in before.items() if not name.startswith(dropped)}
    assert {name: tensor.data_ptr() for name, tensor in hoisted.state_dict().items()} == kept
    assert modulation_linears(hoisted) == {}


def test_what_it_saves():
    with empty_weights():
        model = FluxTransformer2DModel(FLUX_DEV).bfloat16()
        conditionings = [(torch.empty(1).bfloat16(), torch.empty(1).bfloat16(), torch.empty(1, 768).bfloat16())] * 28
        hoisted = hoist(model, conditionings)
    modulation = sum(parameter.numel() for linear in modulation_linears(model).values() for parameter in linear.parameters())
    assert modulation / sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(0.27, abs=0.005)
    tables = sum(buffer.nbytes for buffer in hoisted.buffers())
    assert tables < 0.01 * 2 * modulation
    assert bytes_of(hoisted) < bytes_of(model) - 2 * modulation + tables


def test_another_conditioning_is_refused():
    model, passes = make(TINY)
    hoisted = hoist(model, [conditioning_of(inputs) for inputs in passes])
    for name, value in [("timestep", torch.tensor([0.5, 0.5])), ("guidance", torch.tensor([3.5, 2.0])), ("pooled_projections", None)]:
        other = passes[0] | {name: passes[0]["pooled_projections"] + 1 if value is None else value}
        with pytest.raises(ValueError, match=r"hoisted for 3 other conditionings, got timestep .* for a batch of 2: hoist again"):
            hoisted(**other)
    with pytest.raises(ValueError, match="transformer: expected one with modulation weights, got one that is hoisted already"):
        hoist(hoisted, [conditioning_of(passes[0])])
    with pytest.raises(ValueError, match="conditionings: expected at least one pass, got none"):
        hoist(model, [])


def test_a_planted_bug_is_noticed():
    model, passes = make(TINY)
    hoisted = hoist(model, [conditioning_of(inputs) for inputs in passes])
    hoisted.transformer_blocks[0].norm1.linear.table = hoisted.transformer_blocks[0].norm1.linear.table.flip(0)
    assert not torch.equal(hoisted(**passes[0]), model(**passes[0]))


@pytest.fixture(scope="module", params=KINDS, ids=KINDS)
def pipe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_random(folder, *KINDS[request.param])
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("case", ["negative_2", "batch", "sigmas"])
def test_rehearsal_finds_what_the_loop_asks_for(pipe, case):
    arguments = SETTINGS | CASES[case] | {"generator": seeded()}
    before = torch.get_rng_state(), arguments["generator"].get_state()
    conditionings = rehearse(pipe, **arguments)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(arguments["generator"].get_state(), before[1])
    expected = pipe(**arguments, output_type="pt").images
    plain, pipe.transformer = pipe.transformer, hoist(pipe.transformer, conditionings)
    try:
        assert torch.equal(pipe(**arguments | {"generator": seeded()}, output_type="pt").images, expected)
    finally:
        pipe.transformer = plain
    assert len(conditionings) == 3 * (2 if case == "negative_2" else 1)
