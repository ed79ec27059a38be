"""flux_lab.sd15.pipeline: from one folder, ours and diffusers' StableDiffusionPipeline make the same picture."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline as Reference
from sd15_checkpoints import CLIP, SCHEDULERS, VAE, write_checkpoint

from flux_lab.checkpoints import CheckpointError
from flux_lab.sd15.pipeline import load_sd15

PROMPT, OTHER, NEGATIVE = "a red cube", "a small blue cone behind a large sphere", "a blurry picture"
SETTINGS = {"height": 48, "width": 80, "num_inference_steps": 5}


@pytest.fixture(scope="module", params=SCHEDULERS)
def pair(request, tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    reference = Reference.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return load_sd15(folder), reference


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return load_sd15(write_checkpoint(tmp_path_factory.mktemp("ours")))


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def as_bytes(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def assert_same_pictures(ours, reference, theirs=None, **arguments):
    """At most 0.1 % of the bytes differ, by at most 1; and there is something in the picture. `theirs`: the reference's arguments."""
    given = as_bytes(ours(**arguments, generator=seeded()).images)
    wanted = as_bytes(reference(**theirs or arguments, generator=seeded()).images)
    assert given.shape == wanted.shape
    assert np.abs(given - wanted).max() <= 1
    assert (given != wanted).mean() <= 0.001
    assert wanted.std() > 20


CASES = {
    "prompt": {"prompt": PROMPT},
    "negative": {"prompt": PROMPT, "negative_prompt": NEGATIVE},
    "batch": {"prompt": [PROMPT, OTHER], "negative_prompt": [NEGATIVE, ""], "num_images_per_prompt": 2},
    "one negative for all": {"prompt": [PROMPT, OTHER], "guidance_scale": 3.0},
    "no guidance": {"prompt": PROMPT, "guidance_scale": 1.0},
    "its own size": {"prompt": PROMPT, "height": None, "width": None},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(pair, case):
    assert_same_pictures(*pair, **SETTINGS | case)


def test_given_embeddings_and_latents(pair):
    """A prompt of zeros is no empty prompt, but it is one that can be asked for."""
    arguments = SETTINGS | {"prompt_embeds": torch.zeros(1, 77, CLIP.hidden_size), "latents": torch.randn(1, 4, 6, 10)}
    arguments |= {"negative_prompt_embeds": pair[0].encode_prompt(NEGATIVE)}
    assert_same_pictures(*pair, **arguments)


def test_one_generator_for_each_picture(pair):
    arguments = SETTINGS | {"prompt": [PROMPT, OTHER]}
    given, wanted = (as_bytes(pipe(**arguments, generator=[seeded(1), seeded(2)]).images) for pipe in pair)
    assert np.abs(given - wanted).max() <= 1


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_output_types(pair, output_type):
    given, wanted = (pipe(PROMPT, generator=seeded(), output_type=output_type, **SETTINGS).images for pipe in pair)
    assert type(given) is type(wanted)
    torch.testing.assert_close(torch.as_tensor(given), torch.as_tensor(wanted), rtol=1e-4, atol=1e-4)


def test_prompts_that_change_places_would_be_noticed(pair):
    theirs = SETTINGS | {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    with pytest.raises(AssertionError):
        assert_same_pictures(*pair, theirs, **SETTINGS, prompt=NEGATIVE, negative_prompt=PROMPT)


def test_another_scaling_would_be_noticed(pair, monkeypatch):
    monkeypatch.setattr(pair[0].vae, "config", dataclasses.replace(VAE, scaling_factor=0.3611))
    with pytest.raises(AssertionError):
        assert_same_pictures(*pair, prompt=PROMPT, **SETTINGS)


# ---- the loop -----------------------------------------------------------------------------------------------------------


def test_states_tell_the_whole_walk(ours):
    states = list(ours.steps(PROMPT, generator=seeded(), **SETTINGS))
    assert [state.timestep for state in states] == [801, 601, 601, 401, 201, 1]
    assert [state.index for state in states] == list(range(6))
    for before, after in itertools.pairwise(states):
        assert torch.equal(before.latents, after.sample)
    kept = ours.scheduler.alphas_cumprod
    for state in states:
        signal, spread = kept[state.timestep] ** 0.5, (1 - kept[state.timestep]) ** 0.5
        torch.testing.assert_close(signal * state.x0 + spread * state.model_output, state.sample, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours(PROMPT, generator=seeded(), output_type="latent", **SETTINGS).images, states[-1].latents)
    for name in ("x0", "latents", "sample"):
        assert states[2].image(name).size == (80, 48)
    with pytest.raises(ValueError, match="expected of='x0', 'latents' or 'sample', got 'noise'"):
        states[0].image("noise")


def test_generations_under_way_at_the_same_time(ours):
    alone = [[state.latents for state in ours.steps(prompt, generator=seeded(), **SETTINGS)] for prompt in (PROMPT, OTHER)]
    together = zip(*(ours.steps(prompt, generator=seeded(), **SETTINGS) for prompt in (PROMPT, OTHER)), strict=True)
    for states, wanted in zip(together, zip(*alone, strict=True), strict=True):
        assert [torch.equal(state.latents, each) for state, each in zip(states, wanted, strict=True)] == [True, True]


def test_the_loop_goes_on_from_replaced_latents(ours):
    states = ours.steps(PROMPT, generator=seeded(), **SETTINGS)
    state = next(states)
    state.latents = torch.zeros_like(state.latents)
    assert not next(states).sample.any()


BAD = {
    "no prompt": ({}, ValueError, "prompt: expected either prompt or prompt_embeds, got neither"),
    "both": ({"prompt": PROMPT, "prompt_embeds": torch.zeros(1, 77, 20)}, ValueError, "prompt_embeds, got both"),
    "a number": ({"prompt": 3}, TypeError, "prompt: expected a string or a list of strings, got int"),
    "size": ({"prompt": PROMPT, "height": 50}, ValueError, "height: expected a multiple of 8 pixels, got 50"),
    "latents": (
        {"prompt": PROMPT, "latents": torch.zeros(1, 4, 5, 5)},
        ValueError,
        r"latents: expected \[1, 4, 6, 10\], got \[1, 4, 5, 5\]",
    ),
    "negatives": ({"prompt": [PROMPT] * 3, "negative_prompt": [NEGATIVE] * 2}, ValueError, "one for each of the 3 prompts, got 2"),
    "output": ({"prompt": PROMPT, "output_type": "gif"}, ValueError, "output_type='gif', expected one of"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(ours, arguments, error, message):
    with pytest.raises(error, match=message):
        ours(**SETTINGS | arguments)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such"):
        load_sd15(tmp_path / "nothing")
