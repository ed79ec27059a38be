"""flux_lab.inference.fast: the reference's pictures within fp32 rounding, whatever is asked for."""

import inspect

import pytest
import torch
from test_pipeline import CASES, KINDS, NEGATIVE, PROMPT, PROMPT_2, SETTINGS, quiet, seeded, write_random

from flux_lab import data_dir
from flux_lab.inference import fast, hoist, rehearse
from flux_lab.inference.fast import FastFluxPipeline, cache_error
from flux_lab.pipeline import FluxPipeline

MORE = {
    "batch of 3": {"prompt": [PROMPT, PROMPT_2, NEGATIVE]},
    "batch and negative": {"prompt": [PROMPT, PROMPT_2, PROMPT], "negative_prompt": NEGATIVE, "true_cfg_scale": 3.0},
    "one step": {"prompt": PROMPT, "num_inference_steps": 1},
    "five steps": {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 1.0},
    "one token, long text": {"prompt": PROMPT, "height": 16, "width": 16, "max_sequence_length": 32},
}


@pytest.fixture(scope="module", params=KINDS, ids=KINDS)
def pair(request, tmp_path_factory):
    """A pipeline, and a fast one made from it."""
    folder = tmp_path_factory.mktemp(request.param)
    write_random(folder, *KINDS[request.param])
    pipe = quiet(FluxPipeline.from_pretrained(folder))
    return pipe, quiet(fast(pipe))


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dev")
    write_random(folder, *KINDS["dev"])
    return quiet(FluxPipeline.from_pretrained(folder))


def draw(pipe, **arguments):
    return pipe(**SETTINGS | {"output_type": "pt", "generator": seeded()} | arguments).images


def assert_equal_within_rounding(given, wanted):
    assert given.dtype == wanted.dtype
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [*CASES.values(), *MORE.values()], ids=[*CASES, *MORE])
def test_equal(pair, case):
    pipe, faster = pair
    wanted = draw(pipe, **case)
    assert wanted.std() > 0.05, "there is something in the picture"
    assert_equal_within_rounding(draw(faster, **case), wanted)


def test_every_state_of_the_loop_is_equal(pair):
    pipe, faster = pair
    states = [list(each.steps(PROMPT, generator=seeded(), **SETTINGS)) for each in (pipe, faster)]
    for wanted, given in zip(*states, strict=True):
        assert (given.index, given.sigma, given.sigma_next) == (wanted.index, wanted.sigma, wanted.sigma_next)
        assert torch.equal(given.timestep, wanted.timestep)
        for name in ("latents", "velocity", "x0", "prompt_embeds"):
            assert_equal_within_rounding(getattr(given, name), getattr(wanted, name))
    assert given.image().size == wanted.image().size


def test_two_passes_in_place_of_one_batch(dev):
    case = CASES["negative"]
    assert_equal_within_rounding(draw(quiet(fast(dev, batch_cfg=False)), **case), draw(dev, **case))


def test_a_callback_may_change_the_latents_and_the_text(dev):
    def change(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] * 1.25, "prompt_embeds": tensors["prompt_embeds"] * 0.5}

    arguments = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "output_type": "latent",
        **CASES["negative"],
    }
    assert_equal_within_rounding(draw(quiet(fast(dev)), **arguments), draw(dev, **arguments))


def test_a_callback_may_change_the_text_in_place(dev):
    def change(pipe, index, timestep, tensors):
        tensors["prompt_embeds"].mul_(0.5)
        return {}

    arguments = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "output_type": "latent",
        **CASES["negative"],
    }
    wanted = draw(dev, **arguments)
    assert (wanted - draw(dev, **CASES["negative"], output_type="latent")).abs().max() > 0.01, "it makes a difference"
    assert_equal_within_rounding(draw(quiet(fast(dev)), **arguments), wanted)


def test_a_negative_text_of_another_length(dev):
    negative = dev.encode_prompt(NEGATIVE, max_sequence_length=SETTINGS["max_sequence_length"] + 5)
    arguments = {
        "prompt": PROMPT,
        "negative_prompt_embeds": negative.prompt_embeds,
        "negative_pooled_prompt_embeds": negative.pooled_prompt_embeds,
        "true_cfg_scale": 2.5,
    }
    assert_equal_within_rounding(draw(quiet(fast(dev)), **arguments), draw(dev, **arguments))


def test_the_pipe_is_left_as_it_is(dev):
    def layout():
        models = (dev.transformer, dev.vae, dev.text_encoder, dev.text_encoder_2)
        return [(name, tensor.data_ptr(), tensor.stride()) for model in models for name, tensor in model.state_dict().items()]

    before = layout()
    wanted = draw(dev, prompt=PROMPT)
    faster = quiet(fast(dev))
    draw(faster, prompt=PROMPT)
    assert layout() == before
    assert torch.equal(draw(dev, prompt=PROMPT), wanted)


def test_same_arguments_as_the_reference():
    ours, reference = (inspect.signature(kind.steps).parameters for kind in (FastFluxPipeline, FluxPipeline))
    assert list(ours) == list(reference)
    assert [each.default for each in ours.values()] == [each.default for each in reference.values()]


def test_bfloat16_is_no_worse_than_the_reference_in_bfloat16(dev, tmp_path):
    dev.save_pretrained(tmp_path, tokenizers=data_dir() / "flux-mini")
    half = quiet(FluxPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16))
    exact, slow, quick = (
        draw(pipe, prompt=PROMPT, output_type="latent").float() for pipe in (dev, half, quiet(fast(dev, dtype=torch.bfloat16)))
    )
    assert (quick - exact).norm() <= 1.3 * (slow - exact).norm()
    assert next(dev.transformer.parameters()).dtype == torch.float32


@pytest.mark.parametrize("part", ["modulation", "rotation", "bias"])
def test_a_planted_bug_is_noticed(dev, part):
    faster = quiet(fast(dev))
    prepare = faster.transformer.prepare

    def broken(*arguments):
        prepared = prepare(*arguments)
        if part == "modulation":
            prepared.modulation = prepared.modulation.flip(0)  # the steps the other way round
        if part == "rotation":
            prepared.rotation[..., 1] *= -1
        return prepared

    faster.transformer.prepare = broken
    if part == "bias":
        faster.text_encoder_2.encoder.block[0].layer[0].SelfAttention.compute_bias(SETTINGS["max_sequence_length"]).zero_()
    with pytest.raises(AssertionError):
        assert_equal_within_rounding(draw(faster, prompt=PROMPT), draw(dev, prompt=PROMPT))


# ---- caching ------------------------------------------------------------------------------------------------------------


def test_caching_is_off_and_costs_nothing(dev):
    faster = quiet(fast(dev))
    draw(faster, prompt=PROMPT)
    assert faster.cache_log == []


def test_caching_reports_what_it_does(dev):
    steps = {"prompt": PROMPT, **SETTINGS, "num_inference_steps": 6}
    never = cache_error(quiet(fast(dev, cache_threshold=1e-9)), **steps)
    assert (never.steps, never.reused) == (6, 0)
    assert never.error < 1e-5
    faster = quiet(fast(dev, cache_threshold=0.99))
    always = cache_error(faster, **steps)
    assert 1 <= always.reused <= 5
    assert always.error > 1e-4
    assert [step.reused for step in faster.cache_log] == [step.change < 0.99 for step in faster.cache_log]
    assert faster.cache_log[0].change == float("inf"), "the first step has nothing to use again"
    assert faster.transformer.cache_threshold == 0.99


# ---- what does not fit --------------------------------------------------------------------------------------------------


def test_clear_errors(dev):
    with pytest.raises(ValueError, match=r"cache_threshold: expected a relative change from 0 \(off\) to below 1, got 2"):
        fast(dev, cache_threshold=2)
    with pytest.raises(ValueError, match="dtype: T5 needs some layers in float32 beside float16"):
        fast(dev, dtype=torch.float16)
    with pytest.raises(ValueError, match="pipe: expected a pipeline of the reference's models, got one that is fast already"):
        fast(fast(dev))
    with pytest.raises(TypeError, match="save_pretrained: a fast pipeline has fused weights"):
        fast(dev).save_pretrained("nowhere", tokenizers="nowhere")
    with pytest.raises(ValueError, match=r"height: expected a whole number of pixels, at least 16, got 8"):
        draw(fast(dev), prompt=PROMPT, height=8)


def test_a_hoisted_pipe_is_refused(dev):
    plain = dev.transformer
    try:
        dev.transformer = hoist(plain, rehearse(dev, PROMPT, **SETTINGS))
        with pytest.raises(ValueError, match="pipe: expected plain linear layers, got HoistedModulation: make it fast before"):
            fast(dev)
    finally:
        dev.transformer = plain


@pytest.mark.slow
def test_compiled(dev):
    compiled = quiet(fast(dev, compile=True))
    for case in (CASES["prompt"], MORE["batch and negative"]):
        assert_equal_within_rounding(draw(compiled, **case), draw(dev, **case))
