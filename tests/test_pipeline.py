"""flux_lab.pipeline: from one folder, ours and diffusers' FluxPipeline make the same picture."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from conftest import randomize_
from diffusers import FluxPipeline as Reference

from flux_lab import data_dir, load_mini
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import CheckpointError, write_pipeline
from flux_lab.clip import CLIPTextModel
from flux_lab.config import FLUX_DEV_SCHEDULER, FLUX_SCHNELL_SCHEDULER, TINY, TINY_CLIP, TINY_T5, TINY_VAE
from flux_lab.pipeline import MINIATURES, FluxPipeline
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

PROMPT, PROMPT_2, NEGATIVE = "a red cube", "a small blue cone behind a large sphere", "a blurry picture"
HEIGHT, WIDTH, LENGTH = 48, 80, 12
SETTINGS = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": LENGTH, "num_inference_steps": 3}
PARTS = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
KINDS = {"dev": (True, FLUX_DEV_SCHEDULER), "schnell": (False, FLUX_SCHNELL_SCHEDULER)}


def write_random(folder, guidance_embeds, scheduler):
    clip = dataclasses.replace(TINY_CLIP, vocab_size=1000, max_position_embeddings=77, hidden_size=TINY.pooled_projection_dim)
    t5 = dataclasses.replace(TINY_T5, vocab_size=512, d_model=TINY.joint_attention_dim)
    models = {
        "transformer": FluxTransformer2DModel(dataclasses.replace(TINY, guidance_embeds=guidance_embeds)),
        "vae": AutoencoderKL(TINY_VAE),
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
    }
    tokenizers = {name: data_dir() / "flux-mini" / name for name in ("tokenizer", "tokenizer_2")}
    models = {name: randomize_(model, seed) for seed, (name, model) in enumerate(models.items())}
    write_pipeline(folder, models=models, scheduler=FlowMatchEulerDiscreteScheduler(scheduler), tokenizers=tokenizers)


@pytest.fixture(scope="module", params=KINDS, ids=KINDS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_random(folder, *KINDS[request.param])
    return quiet(FluxPipeline.from_pretrained(folder)), quiet(Reference.from_pretrained(folder))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    write_random(folder, *KINDS["dev"])
    return quiet(FluxPipeline.from_pretrained(folder))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(count=None):
    return [torch.Generator().manual_seed(seed) for seed in range(count)] if count else torch.Generator().manual_seed(5)


def as_bytes(images):
    return np.stack([np.asarray(image) for image in images])


def assert_same_pictures(ours, reference, **arguments):
    """At most 0.1 % of the bytes differ, by at most 1; and there is something in the picture."""
    given, wanted = (as_bytes(pipe(**arguments, generator=seeded()).images) for pipe in (ours, reference))
    assert given.shape == wanted.shape
    difference = np.abs(given.astype(int) - wanted.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001
    assert wanted.std() > 20


CASES = {
    "prompt": {"prompt": PROMPT},
    "prompt_2": {"prompt": PROMPT, "prompt_2": PROMPT_2},
    "negative": {"prompt": PROMPT, "negative_prompt": NEGATIVE, "true_cfg_scale": 2.5},
    "negative_2": {"prompt": PROMPT, "negative_prompt": NEGATIVE, "negative_prompt_2": PROMPT_2, "true_cfg_scale": 2.5},
    "batch": {"prompt": [PROMPT, PROMPT_2], "num_images_per_prompt": 2},
    "guidance": {"prompt": PROMPT, "guidance_scale": 1.5},
    "sigmas": {"prompt": PROMPT, "sigmas": [1.0, 0.7, 0.2]},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(pair, case):
    assert_same_pictures(*pair, **SETTINGS | case)


def test_parity_at_the_checkpoints_own_size(pair):
    """diffusers does not know the checkpoint's size and length: it must be told."""
    ours, reference = pair
    size = TINY_VAE.sample_size
    given = ours(PROMPT, num_inference_steps=2, generator=seeded(), output_type="pt").images
    wanted = reference(
        PROMPT, num_inference_steps=2, generator=seeded(), output_type="pt", height=size, width=size, max_sequence_length=32
    ).images
    assert given.shape == (1, 3, size, size)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_output_types(pair, output_type):
    given, wanted = (pipe(PROMPT, generator=seeded(), output_type=output_type, **SETTINGS).images for pipe in pair)
    assert type(given) is type(wanted)
    torch.testing.assert_close(torch.as_tensor(given), torch.as_tensor(wanted), rtol=1e-4, atol=1e-4)


def test_given_embeddings_and_latents(pair):
    ours, reference = pair
    text, negative = ours.encode_prompt(PROMPT, max_sequence_length=LENGTH), ours.encode_prompt(NEGATIVE, max_sequence_length=LENGTH)
    arguments = {
        "prompt_embeds": text.prompt_embeds,
        "pooled_prompt_embeds": text.pooled_prompt_embeds,
        "negative_prompt_embeds": negative.prompt_embeds,
        "negative_pooled_prompt_embeds": negative.pooled_prompt_embeds,
        "true_cfg_scale": 2.0,
        "latents": torch.randn(1, 15, TINY.in_channels),
    }
    assert_same_pictures(ours, reference, **SETTINGS | arguments)


def test_one_generator_for_each_picture(pair):
    arguments = SETTINGS | {"prompt": [PROMPT, PROMPT_2]}
    given, wanted = (as_bytes(pipe(**arguments, generator=seeded(2)).images) for pipe in pair)
    assert np.abs(given.astype(int) - wanted).max() <= 1
    alone = as_bytes(pair[0](**SETTINGS, prompt=PROMPT_2, generator=seeded(2)[1]).images)
    assert np.abs(given[1].astype(int) - alone[0]).max() <= 1


def test_a_callback_may_change_the_latents(pair):
    def double(pipe, index, timestep, tensors):
        seen.append((index, float(timestep)))
        return {"latents": tensors["latents"] * 1.25, "prompt_embeds": tensors["prompt_embeds"] * 0.5}

    arguments = {
        "callback_on_step_end": double,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "output_type": "latent",
    }
    seen: list = []
    given, wanted = (pipe(PROMPT, generator=seeded(), **SETTINGS, **arguments).images for pipe in pair)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    assert seen[:3] == seen[3:]


def test_a_planted_bug_is_noticed(pair):
    ours, reference = pair
    parts = {name: getattr(ours, name) for name in PARTS} | {"text_encoder": randomize_(CLIPTextModel(ours.text_encoder.config), seed=99)}
    broken = quiet(FluxPipeline(**parts))
    with pytest.raises(AssertionError):
        assert_same_pictures(broken, reference, **SETTINGS, prompt=PROMPT)


def test_steps_is_the_same_loop(ours):
    states = list(ours.steps(PROMPT, generator=seeded(), **SETTINGS))
    latents = ours(PROMPT, generator=seeded(), output_type="latent", **SETTINGS).images
    assert torch.equal(states[-1].latents, latents)
    assert [state.index for state in states] == [0, 1, 2]
    assert states[0].sigma == 1.0
    assert states[-1].sigma_next == 0.0
    assert torch.allclose(states[-1].x0, states[-1].latents, atol=1e-5), "the last step arrives at the picture that it aims at"
    assert states[1].image().size == (WIDTH, HEIGHT)
    assert states[1].image(of="latents").size == (WIDTH, HEIGHT)


def test_steps_goes_on_from_changed_latents(ours):
    changed = []
    for state in ours.steps(PROMPT, generator=seeded(), **SETTINGS):
        if state.index == 0:
            state.latents = torch.zeros_like(state.latents)
        changed.append(state)
    torch.testing.assert_close(changed[1].x0, -changed[1].sigma * changed[1].velocity)


def test_generations_under_way_at_the_same_time(ours):
    """Also of another number of steps, and with a whole one in between."""
    runs = {prompt: SETTINGS | {"num_inference_steps": steps} for prompt, steps in ((PROMPT, 3), (PROMPT_2, 5))}
    alone = [[state.latents for state in ours.steps(prompt, generator=seeded(), **settings)] for prompt, settings in runs.items()]
    together = [ours.steps(prompt, generator=seeded(), **settings) for prompt, settings in runs.items()]
    for wanted in zip(*alone, strict=False):
        assert [torch.equal(next(run).latents, each) for run, each in zip(together, wanted, strict=True)] == [True, True]
        ours(PROMPT, output_type="latent", **SETTINGS | {"num_inference_steps": 1})


@pytest.mark.parametrize("images", [1, 2])
def test_one_negative_prompt_serves_all(ours, images):
    arguments = SETTINGS | {"prompt": [PROMPT, PROMPT_2], "true_cfg_scale": 2.0, "output_type": "pt", "num_images_per_prompt": images}
    one, two = (ours(**arguments, negative_prompt=negative, generator=seeded()).images for negative in (NEGATIVE, [NEGATIVE, NEGATIVE]))
    assert len(one) == 2 * images
    torch.testing.assert_close(one, two)


def test_every_picture_gets_the_negative_prompt_of_its_prompt(ours):
    arguments = SETTINGS | {"true_cfg_scale": 2.0, "output_type": "pt", "num_images_per_prompt": 2}
    prompts, negatives = [PROMPT, PROMPT_2], [NEGATIVE, "a green cone"]
    together = ours(prompts, negative_prompt=negatives, generator=seeded(4), **arguments).images
    for place in range(2):
        generators = seeded(4)[2 * place : 2 * place + 2]
        alone = ours(prompts[place], negative_prompt=negatives[place], generator=generators, **arguments).images
        torch.testing.assert_close(together[2 * place : 2 * place + 2], alone, rtol=1e-4, atol=1e-4)


def test_several_pictures_of_given_embeddings(ours):
    text = ours.encode_prompt([PROMPT, PROMPT_2], max_sequence_length=LENGTH)
    embeds = {"prompt_embeds": text.prompt_embeds, "pooled_prompt_embeds": text.pooled_prompt_embeds}
    arguments = SETTINGS | {"num_images_per_prompt": 3, "output_type": "pt"}
    given, wanted = (ours(**each, **arguments, generator=seeded()).images for each in (embeds, {"prompt": [PROMPT, PROMPT_2]}))
    assert len(given) == 6
    assert torch.equal(given, wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 8}, "height: expected a whole number of pixels, at least 16, got 8"),
        ({"width": 64.0}, r"width: expected a whole number of pixels, at least 16, got 64\.0"),
        ({"output_type": "jpg"}, "output_type='jpg', expected one of"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"latents": torch.zeros(1, 14, 64)}, r"latents: expected packed latents \[1, 15, 64\] for 48 x 80 pixels, got \[1, 14, 64\]"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "a list of 2 generators for a batch of 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"tensor_inputs: expected a list of some of .*, got \['noise'\]"),
        ({"callback_on_step_end_tensor_inputs": None}, r"tensor_inputs: expected a list of some of .*, got None"),
        ({"generator": 42}, r"generator: expected a torch\.Generator or a list of them, got int"),
        ({"num_inference_steps": "4"}, "num_inference_steps: expected a whole number, got str"),
        (
            {"negative_prompt": [NEGATIVE] * 3, "true_cfg_scale": 2.0},
            "negative_prompt: expected one, or one for each of the 1 prompts, got 3",
        ),
        ({"prompt": None}, "prompt"),
    ],
)
def test_clear_errors(ours, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ours(**SETTINGS | {"prompt": PROMPT} | arguments)


def test_what_is_out_of_scope_is_named(ours):
    with pytest.raises(TypeError, match="joint_attention_kwargs"):
        ours(PROMPT, joint_attention_kwargs={"scale": 1.0})
    with pytest.raises(TypeError, match="guidance_scale: expected a number, got str"):
        ours(PROMPT, guidance_scale="high", **SETTINGS)


def test_warnings(ours):
    with pytest.warns(UserWarning, match="height: 50 is not a multiple of 16, using 48"):
        ours(PROMPT, **SETTINGS | {"height": 50})
    with pytest.warns(UserWarning, match="true_cfg_scale has no effect without a negative_prompt"):
        ours(PROMPT, true_cfg_scale=2.0, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(PROMPT, **SETTINGS)


def test_the_files_own_dtype():
    """The miniature's files have three of them; the transformer's is taken for all."""
    pipe = quiet(FluxPipeline.from_pretrained(data_dir() / "flux-mini", dtype=None))
    models = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {next(model.parameters()).dtype for model in models} == {torch.bfloat16}
    assert pipe(PROMPT, num_inference_steps=1).images[0].size == (128, 128)


def test_not_a_pipeline(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        FluxPipeline.from_pretrained(tmp_path)


def test_save_and_load(ours, tmp_path):
    ours.save_pretrained(tmp_path, tokenizers=data_dir() / "flux-mini")
    again = quiet(FluxPipeline.from_pretrained(tmp_path))
    given, wanted = (pipe(PROMPT, generator=seeded(), output_type="pt", **SETTINGS).images for pipe in (again, ours))
    assert torch.equal(given, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES["prompt"], CASES["prompt_2"], CASES["negative"]], ids=["prompt", "prompt_2", "negative"])
@pytest.mark.parametrize(("kind", "steps"), [("dev", 28), ("schnell", 4)])
def test_the_miniature(kind, steps, case):
    size = {"height": 128, "width": 128, "max_sequence_length": 32, "num_inference_steps": steps}
    assert_same_pictures(quiet(load_mini(kind)), quiet(Reference.from_pretrained(data_dir() / MINIATURES[kind])), **size | case)


def test_there_are_two_miniatures():
    assert load_mini("schnell").transformer.config.guidance_embeds is False
    with pytest.raises(ValueError, match=r"kind: expected one of \['dev', 'schnell'\], got 'pro'"):
        load_mini("pro")
