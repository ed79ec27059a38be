"""flux_lab.inference.staged: the pipeline's own picture, one stage in memory at a time."""

import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from test_pipeline import CASES, KINDS, LENGTH, NEGATIVE, PROMPT, PROMPT_2, SETTINGS, seeded, write_random

from flux_lab import data_dir
from flux_lab.checkpoints import CheckpointError
from flux_lab.inference import staged as module
from flux_lab.inference.hoisting import HoistedConditioning
from flux_lab.inference.memory import BudgetError
from flux_lab.inference.quantization import SCHEMES, quantize_checkpoint
from flux_lab.inference.staged import load_staged
from flux_lab.pipeline import FluxPipeline
from flux_lab.prompt import encode_prompt


@pytest.fixture(scope="module", params=KINDS, ids=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    write_random(folder, *KINDS[request.param])
    return folder


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def staged_pipe(folder, **options):
    return quiet(load_staged(folder, **{"dtype": torch.float32} | options))


OPTIONS = {"hoisted": {}, "as it is": {"hoisted": False}, "streamed": {"stream": True}}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", ["prompt_2", "negative_2", "batch", "sigmas"])
def test_same_picture_as_the_plain_pipeline(folder, case, options):
    arguments = SETTINGS | CASES[case] | {"output_type": "pt"}
    expected = quiet(FluxPipeline.from_pretrained(folder))(**arguments, generator=seeded()).images
    given = staged_pipe(folder, **options)(**arguments, generator=seeded()).images
    assert torch.equal(given, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_picture_of_the_miniature(dtype):
    arguments = {"prompt": PROMPT, "negative_prompt": "a cone", "true_cfg_scale": 2.0, "num_inference_steps": 2}
    path = data_dir() / "flux-mini"
    expected = quiet(FluxPipeline.from_pretrained(path, dtype))(**arguments, generator=seeded()).images[0]
    given = staged_pipe(path, dtype=dtype, memory_budget="1GB")(**arguments, generator=seeded()).images[0]
    assert np.array_equal(np.asarray(given), np.asarray(expected))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["dev"], indirect=True)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_on_the_way_or_before(folder, scheme, tmp_path):
    arguments = SETTINGS | {"prompt": PROMPT, "output_type": "pt"}
    quantize_checkpoint(folder, tmp_path / "small", scheme)
    pictures = [
        staged_pipe(path, hoisted=False, **options)(**arguments, generator=seeded()).images
        for path, options in [
            (folder, {"quantize": scheme}),
            (tmp_path / "small", {"quantize": scheme}),
            (tmp_path / "small", {}),
            (tmp_path / "small", {"stream": True}),
        ]
    ]
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    exact = staged_pipe(folder)(**arguments, generator=seeded()).images
    assert 0 < (pictures[0] - exact).abs().mean() < 0.25


@pytest.mark.parametrize("folder", ["dev"], indirect=True)
@pytest.mark.parametrize("freed", [True, False], ids=["freed", "a stage that is not freed is noticed"])
def test_stages_one_after_the_other(folder, freed, monkeypatch):
    """When one stage loads, the models of the one before are gone."""
    alive, most, kept = [], [], []

    def watch(load):
        def watched(*arguments, **options):
            model = load(*arguments, **options)
            alive.append((type(model).__name__, weakref.ref(model)))
            kept.extend([] if freed else [model])
            most.append([name for name, model in alive if model() is not None])
            return model

        return watched

    for name in ("load_clip", "load_lean", "load_autoencoder"):
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    staged_pipe(folder)(PROMPT, **SETTINGS)
    one_by_one = [["CLIPTextModel"], ["CLIPTextModel", "T5EncoderModel"], ["FluxTransformer2DModel"], ["AutoencoderKL"]]
    assert (most == one_by_one) == freed


def texts_swapped(monkeypatch):
    encode = module.StagedPipeline.encode

    def bug(self, texts, *arguments, **options):
        return encode(self, dict(zip(texts, reversed(texts.values()), strict=True)), *arguments, **options)

    monkeypatch.setattr(module.StagedPipeline, "encode", bug)


def pooled_text_lost(monkeypatch):
    def bug(encoders, *arguments, **options):
        text = encode_prompt(encoders, *arguments, **options)
        return text._replace(pooled_prompt_embeds=torch.zeros_like(text.pooled_prompt_embeds))

    monkeypatch.setattr(module, "encode_prompt", bug)


def tables_of_other_steps(monkeypatch):
    """Each step looks up what was computed for the next."""
    find = HoistedConditioning._find
    monkeypatch.setattr(HoistedConditioning, "_find", lambda self, given: (find(self, given) + 1) % len(self.known))


@pytest.mark.parametrize("folder", ["dev"], indirect=True)
@pytest.mark.parametrize("bug", [None, texts_swapped, pooled_text_lost, tables_of_other_steps])
def test_planted_bugs_are_noticed(folder, bug, monkeypatch):
    arguments = SETTINGS | CASES["negative_2"] | {"output_type": "pt"}
    expected = quiet(FluxPipeline.from_pretrained(folder))(**arguments, generator=seeded()).images
    if bug is not None:
        bug(monkeypatch)
    assert torch.equal(staged_pipe(folder)(**arguments, generator=seeded()).images, expected) == (bug is None)


@pytest.mark.parametrize("folder", ["dev"], indirect=True)
def test_embeddings_latents_and_callback_reach_the_loop(folder):
    plain = quiet(FluxPipeline.from_pretrained(folder))
    text = plain.encode_prompt(PROMPT, max_sequence_length=12)
    given = {"prompt_embeds": text.prompt_embeds, "pooled_prompt_embeds": text.pooled_prompt_embeds, "num_inference_steps": 2}
    seen = []

    def look(pipe, index, timestep, tensors):
        seen.append(index)
        return {"latents": tensors["latents"] * 0.5}

    arguments = given | {"latents": torch.randn(1, 16, 64), "output_type": "latent", "callback_on_step_end": look}
    assert torch.equal(staged_pipe(folder)(**arguments).images, plain(**arguments).images)
    assert seen == [0, 1, 0, 1]


def embeds_of(pipe, prompts, sign=""):
    text = pipe.encode_prompt(prompts, max_sequence_length=LENGTH)
    return {f"{sign}prompt_embeds": text.prompt_embeds, f"{sign}pooled_prompt_embeds": text.pooled_prompt_embeds}


@pytest.mark.parametrize("folder", ["dev"], indirect=True)
@pytest.mark.parametrize("negative", [None, "text", "embeddings"])
@pytest.mark.parametrize("given", [True, False], ids=["embeddings", "texts"])
def test_several_pictures_of_each(folder, given, negative, monkeypatch):
    plain, pipe, planned = quiet(FluxPipeline.from_pretrained(folder)), staged_pipe(folder), []
    prompts, negatives = [PROMPT, PROMPT_2], [NEGATIVE, PROMPT]
    arguments = SETTINGS | {"num_images_per_prompt": 2, "output_type": "pt", "true_cfg_scale": 2.0 if negative else 1.0}
    arguments |= embeds_of(plain, prompts) if given else {"prompt": prompts}
    arguments |= {
        None: {},
        "text": {"negative_prompt": negatives},
        "embeddings": embeds_of(plain, negatives, "negative_"),
    }[negative]
    plan = pipe.plan
    monkeypatch.setattr(pipe, "plan", lambda **settings: planned.append(settings["batch"]) or plan(**settings))
    pictures = pipe(**arguments, generator=seeded()).images
    assert torch.equal(pictures, plain(**arguments, generator=seeded()).images)
    assert planned == [len(pictures)] == [4]


REFUSED = {
    "prompt and embeddings": ["", {"prompt": PROMPT}],
    "prompt_2 and embeddings": ["", {"prompt_2": PROMPT}],
    "negative prompt and embeddings": ["negative_", {"prompt": PROMPT, "negative_prompt": NEGATIVE, "true_cfg_scale": 2.0}],
    "no text": [None, {}],
    "output_type": [None, {"prompt": PROMPT, "output_type": "jpg"}],
    "unknown": [None, {"prompt": PROMPT, "joint_attention_kwargs": {}}],
    "guidance": [None, {"prompt": PROMPT, "guidance_scale": "high"}],
    "height": [None, {"prompt": PROMPT, "height": 48.0}],
    "latents": [None, {"prompt": PROMPT, "latents": torch.zeros(1, 14, 64)}],
    "steps": [None, {"prompt": PROMPT, "num_inference_steps": 0}],
    "length": [None, {"prompt": PROMPT, "max_sequence_length": 1000}],
}


@pytest.mark.parametrize("folder", ["dev"], indirect=True)
@pytest.mark.parametrize(("sign", "arguments"), REFUSED.values(), ids=REFUSED)
def test_the_pipelines_own_errors_before_anything_is_loaded(folder, sign, arguments, monkeypatch):
    plain = quiet(FluxPipeline.from_pretrained(folder))
    arguments = SETTINGS | arguments | ({} if sign is None else embeds_of(plain, PROMPT, sign))
    with pytest.raises((ValueError, TypeError)) as wanted:
        plain(**arguments)
    for name in ("load_clip", "load_lean", "load_autoencoder"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("loaded"))
    with pytest.raises(wanted.type, match=re.escape(str(wanted.value))):
        staged_pipe(folder)(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["dev"], indirect=True)
def test_refusals(folder, tmp_path):
    with pytest.raises(BudgetError, match=r"memory_budget: expected at least .*, got 0\.10 MB"):
        load_staged(folder, memory_budget=100_000)
    pipe = staged_pipe(folder, memory_budget="8MB")
    with pytest.raises(BudgetError, match=r"memory_budget: expected at least .* which stage 'decode' needs"):
        pipe(PROMPT, height=1024, width=1024)
    with pytest.raises(ValueError, match="memory_budget: expected a size such as"):
        load_staged(folder, memory_budget="much")
    with pytest.raises(ValueError, match=r"quantize: expected one of \[None, 'int8', 'nf4'\], got 'int4'"):
        load_staged(folder, quantize="int4")
    with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:77'"):
        load_staged(folder, device="cuda:77")
    with pytest.raises(ValueError, match=r"dtype: expected one of \[torch.float32, torch.bfloat16\], got torch.float16"):
        load_staged(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="weights are streamed as they are on disk, expected quantized ones; quantize_checkpoint"):
        load_staged(folder, quantize="int8", stream=True)
    with pytest.raises(TypeError, match="prompt: expected"):
        pipe()
    shutil.copytree(folder, tmp_path / "broken", ignore=shutil.ignore_patterns("model_index.json"))
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        load_staged(tmp_path / "broken")
    quantize_checkpoint(folder, tmp_path / "small", "nf4")
    with pytest.raises(CheckpointError, match="expected weights quantized as int8, found nf4"):
        load_staged(tmp_path / "small", quantize="int8")
