"""The training stages: each learns on a few scenes, writes what the next one reads, and has the target that its docstring says."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize_
from safetensors.torch import load_file, save_file
from torch import nn

from flux_lab import shapes
from flux_lab.checkpoints import load_autoencoder, load_clip, load_t5, load_transformer
from flux_lab.clip import CLIPTextModel
from flux_lab.config import FLUX_DEV_SCHEDULER, TINY, TINY_CLIP, TINY_T5, TINY_VAE
from flux_lab.latents import pack_latents, prepare_latent_image_ids
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift
from flux_lab.t5 import T5EncoderModel
from flux_lab.t5_tokenizer import T5Tokenizer
from flux_lab.training import clip, flow, grow, guidance, scenes, schnell, t5, texts, tokenizers, vae
from flux_lab.training.loop import Settings
from flux_lab.transformer import FluxTransformer2DModel

pytestmark = [
    # The loop leaves its log open until it is collected, and torch warns of pictures that are mapped read-only.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]

COUNT, CAPTIONS = 12, 3
MINI = dataclasses.replace(TINY, in_channels=64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def overfit(task, batch, steps=25, rate=3e-3):
    """Losses of a task that sees one batch again and again."""
    optimizer = torch.optim.AdamW([each for each in task.parameters() if each.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = task(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder as `runs/`, with scenes and tokenizers."""
    out = tmp_path_factory.mktemp("runs")
    scenes.write_scenes(out / "scenes", scenes.Settings(count=COUNT, captions=CAPTIONS))
    tokenizers.main(["--scenes", str(out / "scenes"), "--out", str(out / "tokenizers")])
    return out


@pytest.fixture(scope="module")
def trained(runs):
    """All stages, one after another, a few steps each; a thirteenth of the miniature's depth."""
    read = ["--scenes", str(runs / "scenes"), "--tokenizers", str(runs / "tokenizers")]
    few = ["--steps", "2", "--batch", "4"]
    vae.main(["--scenes", str(runs / "scenes"), "--out", str(runs / "vae"), "--steps", "2", "--batch", "4"])
    t5.main([*read, "--out", str(runs / "t5"), *few])
    clip.main([*read, "--out", str(runs / "clip"), *few])
    read += ["--latents", str(runs / "vae" / "latents.safetensors")]
    read += ["--clip", str(runs / "clip" / "text_encoder"), "--t5", str(runs / "t5" / "text_encoder_2")]
    flow.main([*read, "--out", str(runs / "flow"), *few, "--layers", "1", "2"])
    grow.main(["--initial", str(runs / "flow" / "transformer"), "--out", str(runs / "grown"), "--layers", "2", "3"])
    students = ["--initial", str(runs / "grown" / "transformer"), "--teacher", str(runs / "flow" / "transformer")]
    guidance.main([*read, "--out", str(runs / "deepened"), *few, *students])
    schnell.main([*read, "--out", str(runs / "schnell"), *few, *students])
    return runs


# ---- what the commands leave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["vae", "t5", "clip", "flow", "deepened", "schnell"])
def test_every_stage_logs_finite_losses(trained, stage):
    lines = log_of(trained / stage)
    assert [line["step"] for line in lines] == [0, 1]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_every_stage_writes_what_loads(trained):
    autoencoder = load_autoencoder(trained / "vae" / "vae")
    assert autoencoder.config.sample_size == 128
    assert load_clip(trained / "clip" / "text_encoder").config.vocab_size == 1000
    assert load_t5(trained / "t5" / "text_encoder_2").config.vocab_size == 512
    depths = {name: load_transformer(trained / name / "transformer").config for name in ("flow", "grown", "deepened")}
    assert {name: (config.num_layers, config.num_single_layers) for name, config in depths.items()} == {
        "flow": (1, 2),
        "grown": (2, 3),
        "deepened": (2, 3),
    }
    assert all(config.guidance_embeds for config in depths.values())
    few_steps = load_transformer(trained / "schnell" / "transformer").config
    assert (few_steps.num_layers, few_steps.num_single_layers, few_steps.guidance_embeds) == (2, 3, False)


@pytest.mark.slow
def test_two_processes_share_the_encoding(trained, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "flux_lab.training.vae"]
    options = ["--scenes", str(trained / "scenes"), "--out", str(tmp_path), "--steps", "2", "--batch", "4", "--encode", "5"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *options], check=True, capture_output=True, timeout=300, env=environment)
    autoencoder = load_autoencoder(tmp_path / "vae")
    pictures = vae.to_tensor(np.array(scenes.read_images(trained / "scenes")[:5]))
    with torch.no_grad():
        expected = (autoencoder.encode(pictures).mode() - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    torch.testing.assert_close(load_file(tmp_path / "latents.safetensors")["latents"].float(), expected, rtol=2e-3, atol=2e-3)


def test_latents_are_the_exported_encoders_scaled_to_mean_0_and_deviation_1(trained):
    latents = load_file(trained / "vae" / "latents.safetensors")["latents"]
    assert latents.shape == (COUNT, 16, 16, 16)
    assert latents.dtype == torch.float16
    assert latents.float().mean().abs() < 0.01
    assert latents.float().std() == pytest.approx(1, abs=0.01)
    autoencoder = load_autoencoder(trained / "vae" / "vae")
    pictures = vae.to_tensor(np.array(scenes.read_images(trained / "scenes")[5:6]))
    mean = autoencoder.encode(pictures).mean.detach()
    expected = (mean - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    torch.testing.assert_close(latents[5:6].float(), expected, rtol=5e-3, atol=5e-3)


def test_a_stage_that_is_started_again_goes_on(trained):
    before = load_file(trained / "flow" / "transformer" / "diffusion_pytorch_model.safetensors")
    read = ["--scenes", str(trained / "scenes"), "--tokenizers", str(trained / "tokenizers")]
    read += ["--latents", str(trained / "vae" / "latents.safetensors"), "--clip", str(trained / "clip" / "text_encoder")]
    read += ["--t5", str(trained / "t5" / "text_encoder_2"), "--out", str(trained / "flow"), "--layers", "1", "2"]
    flow.main([*read, "--steps", "2", "--batch", "4"])
    after = load_file(trained / "flow" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(log_of(trained / "flow")) == 2


# ---- texts --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids(runs):
    return texts.caption_ids(runs / "scenes", runs / "tokenizers")


def test_targets_say_in_the_standard_wording_what_their_captions_state(runs, ids):
    tokenizer = T5Tokenizer.from_pretrained(runs / "tokenizers" / "tokenizer_2")
    stated = scenes.read_captions(runs / "scenes")
    assert ids.t5.shape == ids.target.shape == (COUNT, CAPTIONS, 32)
    assert ids.clip.shape == (COUNT, CAPTIONS, 77)
    for row in range(COUNT):
        for column in range(CAPTIONS):
            caption = stated[row][column]
            assert ids.t5[row, column].tolist() == tokenizer(caption.text)[0].tolist()
            assert ids.target[row, column].tolist() == tokenizer(texts.standard(caption.stated))[0].tolist()


def test_ids_are_made_once_and_again_for_other_captions(runs, ids, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(texts, "_tokenize", refuse)
    assert all(torch.equal(one, other) for one, other in zip(texts.caption_ids(runs / "scenes", runs / "tokenizers"), ids, strict=True))
    (tmp_path / "ids.safetensors").write_bytes((runs / "scenes" / "ids.safetensors").read_bytes())
    (tmp_path / "scenes.jsonl").write_text((runs / "scenes" / "scenes.jsonl").read_text().replace("red", "blue"))
    with pytest.raises(AssertionError, match="tokenized again"):
        texts.caption_ids(tmp_path, runs / "tokenizers")


# ---- autoencoder --------------------------------------------------------------------------------------------------------


def test_the_autoencoder_begins_quiet_and_learns(runs):
    images = vae.to_tensor(np.array(scenes.read_images(runs / "scenes")[:2, 40:104, 40:104]))
    task = vae.VAELoss(TINY_VAE)
    noise = torch.randn(2, 16, 8, 8, generator=generator())
    with torch.no_grad():
        assert task.vae.encode(images).logvar.mean() == pytest.approx(vae.FIRST_LOGVAR, abs=1)
    losses = overfit(task, {"images": images, "noise": noise}, steps=8)
    assert losses[-1] < 0.85 * losses[0]


def test_the_autoencoder_sees_crops_first_then_whole_pictures(runs):
    images = scenes.read_images(runs / "scenes")
    pictures = vae.Pictures(images, Settings(steps=8, batch_size=8, learning_rate=1), TINY_VAE)
    shapes_seen = [tuple(pictures(step, generator())["images"].shape) for step in (0, 5, 6, 7)]
    assert shapes_seen == [(8, 3, 64, 64), (8, 3, 64, 64), (2, 3, 128, 128), (2, 3, 128, 128)]
    assert pictures(6, generator())["noise"].shape == (2, 16, 16, 16)
    whole = pictures(7, generator(3))["images"]
    assert all(any(torch.equal(each, vae.to_tensor(np.array(images[i : i + 1]))[0]) for i in range(COUNT)) for each in whole)
    assert torch.equal(whole, pictures(7, generator(3))["images"])
    assert whole.min() >= -1
    assert whole.max() <= 1


def test_scaling_is_measured():
    latents = 3 + 2 * torch.randn(20, 4, 8, 8, generator=generator())
    config = vae.measured_scaling(TINY_VAE, latents)
    assert (config.shift_factor, config.scaling_factor) == pytest.approx((3, 0.5), abs=0.02)


# ---- text encoders ------------------------------------------------------------------------------------------------------


def test_t5_learns_to_rewrite(ids):
    torch.manual_seed(0)
    task = t5.Rewriter(dataclasses.replace(TINY_T5, vocab_size=512), length=32)
    batch = t5.Rewrites(ids, Settings(steps=1, batch_size=6, learning_rate=1))(0, generator())
    losses = overfit(task, batch, steps=15, rate=1e-2)
    assert losses[-1] < 0.75 * losses[0]


def test_t5s_decoder_never_sees_the_token_that_it_is_to_say(ids):
    config = dataclasses.replace(TINY_T5, vocab_size=512)
    task = randomize_(t5.Rewriter(config, length=32))
    source, target = ids.t5[:2, 0].long(), ids.target[:2, 0].long()
    said = []
    task.head.register_forward_hook(lambda module, inputs, output: said.append(output))
    changed = target.clone()
    changed[:, 4] = (changed[:, 4] + 7) % 500 + 3
    for given in (target, changed):
        task(source, given)
    torch.testing.assert_close(said[0][:, :5], said[1][:, :5], rtol=0, atol=1e-5)
    assert (said[0][:, 5] - said[1][:, 5]).abs().max() > 1e-2


def test_clip_pairs_are_of_one_scene(runs, ids):
    images = scenes.read_images(runs / "scenes")
    batch = clip.Pairs(images, ids, Settings(steps=1, batch_size=9, learning_rate=1))(0, generator())
    small = F.avg_pool2d(vae.to_tensor(np.array(images)), clip.SHRINK)
    length = batch["ids"].shape[1]
    for picture, caption in zip(batch["images"], batch["ids"], strict=True):
        (scene,) = [i for i in range(COUNT) if torch.equal(small[i], picture)]
        assert any(torch.equal(caption, ids.clip[scene, column, :length].long()) for column in range(CAPTIONS))
    # Nothing but padding is cut off, and the end token of the longest caption is kept.
    assert (ids.clip[:, :, length - 1 :] == 999).all()


def test_clip_learns_to_match(runs, ids):
    torch.manual_seed(0)
    task = clip.Contrast(dataclasses.replace(TINY_CLIP, vocab_size=1000, max_position_embeddings=77))
    batch = clip.Pairs(scenes.read_images(runs / "scenes"), ids, Settings(steps=1, batch_size=8, learning_rate=1))(0, generator())
    losses = overfit(task, batch, steps=12)
    assert losses[-1] < 0.9 * losses[0]


# ---- flow ---------------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """In the transformer's place: notes what it is given and answers with `answer(arguments)`."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.config, self.calls = answer, TINY, []

    def forward(self, **arguments):
        self.calls.append(arguments)
        return self.answer(arguments)


class TextRecorder(nn.Module):
    """In the encoders' place: token vectors and pooled vectors that hold the ids themselves."""

    def forward(self, clip_ids, t5_ids):
        return t5_ids[..., None].float(), clip_ids.float()


def flow_batch(count=3):
    latents, noise = torch.randn(2, count, 16, 4, 6, generator=generator())
    return {
        "latents": latents,
        "noise": noise,
        "t": torch.tensor([0.0, 0.3, 1.0]),
        "clip_ids": torch.arange(count * 5).reshape(count, 5),
        "t5_ids": torch.arange(count * 4).reshape(count, 4),
    }


@pytest.mark.parametrize(("sign", "learned"), [(1, True), (-1, False)])
def test_the_flows_target_is_noise_minus_picture(sign, learned):
    batch = flow_batch()
    velocity = sign * pack_latents(batch["noise"] - batch["latents"])
    loss = flow.FlowLoss(Recorder(lambda _: velocity), TextRecorder())(**batch)["loss"]
    assert (loss.item() == 0) == learned


def test_the_flows_path_goes_straight_from_picture_to_noise():
    batch = flow_batch()
    recorder = Recorder(lambda given: torch.zeros_like(given["hidden_states"]))
    flow.FlowLoss(recorder, TextRecorder())(**batch)
    (given,) = recorder.calls
    t = batch["t"][:, None, None, None]
    torch.testing.assert_close(given["hidden_states"], pack_latents((1 - t) * batch["latents"] + t * batch["noise"]))
    assert torch.equal(given["timestep"], batch["t"])
    assert torch.equal(given["guidance"], torch.ones(3))
    assert torch.equal(given["encoder_hidden_states"][..., 0], batch["t5_ids"].float())
    assert torch.equal(given["pooled_projections"], batch["clip_ids"].float())
    assert given["img_ids"].shape == (6, 3)
    assert not given["txt_ids"].any()


def test_the_sampler_walks_the_flows_path_back():
    """The scheduler's steps, given the velocity that is the flow's target, arrive at the picture."""
    batch = flow_batch()
    scheduler = FlowMatchEulerDiscreteScheduler(FLUX_DEV_SCHEDULER)
    scheduler.set_timesteps(num_inference_steps=4, mu=calculate_shift(64))
    sample = batch["noise"]
    for timestep in scheduler.timesteps:
        sample = scheduler.step(batch["noise"] - batch["latents"], timestep, sample)
    torch.testing.assert_close(sample, batch["latents"])


@pytest.fixture(scope="module")
def numbered(runs):
    """Batches whose latents hold the number of their scene."""
    numbers = torch.arange(COUNT).half()[:, None, None, None].expand(COUNT, 16, 16, 16).contiguous()
    save_file({"latents": numbers}, runs / "numbers.safetensors")
    return flow.FlowBatches(runs / "scenes", runs / "tokenizers", runs / "numbers.safetensors", batch_size=1500)


@pytest.fixture(scope="module")
def large_batch(numbered):
    return numbered(0, generator())


def test_t_is_logit_normal_and_shifted_as_in_sampling(large_batch):
    logit = torch.logit(large_batch["t"].double())
    mu = calculate_shift(64)
    assert logit.mean() == pytest.approx(mu, abs=0.1)
    assert logit.std() == pytest.approx(1, abs=0.06)
    assert abs(logit.median().item() - mu) < 0.1
    # The same map as the sampler's: its own shift takes a plain logit-normal t to this one.
    plain = torch.sigmoid(torch.linspace(-3, 3, 13, dtype=torch.float64)).numpy()
    shifted = FlowMatchEulerDiscreteScheduler(FLUX_DEV_SCHEDULER).time_shift(mu, plain)
    np.testing.assert_allclose(np.log(shifted / (1 - shifted)), np.linspace(-3, 3, 13) + mu, atol=1e-9)


def test_captions_are_of_the_latents_scene_and_sometimes_empty(numbered, large_batch, ids):
    empty = (large_batch["t5_ids"] == numbered.no_t5).all(dim=1)
    unpooled = (large_batch["clip_ids"] == numbered.no_clip).all(dim=1)
    assert (unpooled | ~empty).all()
    assert unpooled[~empty].float().mean() == pytest.approx(flow.DROP_POOLED, abs=0.04)
    assert empty.float().mean() == pytest.approx(flow.DROP_TEXT, abs=0.03)
    scene = large_batch["latents"][:, 0, 0, 0].long()
    assert set(scene.tolist()) == set(range(COUNT))
    for name, own in (("clip_ids", ids.clip), ("t5_ids", ids.t5)):
        match = (large_batch[name][:, None] == own[scene]).all(dim=-1)
        assert (match.any(dim=1) | (unpooled if name == "clip_ids" else empty)).all(), name
    both = (large_batch["clip_ids"][:, None] == ids.clip[scene]).all(-1) & (large_batch["t5_ids"][:, None] == ids.t5[scene]).all(-1)
    assert (both.any(dim=1) | unpooled).all()


def test_batches_depend_on_their_generator_alone(numbered):
    small = copy.copy(numbered)
    small.batch_size = 4
    first, again, other = (small(0, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], other["noise"])
    assert first["noise"].std() == pytest.approx(1, abs=0.05)


def test_a_new_transformer_is_the_identity_in_every_block():
    transformer = flow.initialize(FluxTransformer2DModel(MINI))
    seen = {}
    for name in ("transformer_blocks.1", "single_transformer_blocks.2"):
        transformer.get_submodule(name).register_forward_hook(
            lambda module, inputs, given, output, name=name: seen.update({name: (given, output)}), with_kwargs=True
        )
    velocity = transformer_call(transformer)
    assert not velocity.any()
    assert len(seen) == 2
    for given, output in seen.values():
        text, image = output
        torch.testing.assert_close(image, given["hidden_states"], rtol=0, atol=1e-6)
        torch.testing.assert_close(text, given["encoder_hidden_states"], rtol=0, atol=1e-6)


def transformer_call(transformer, seed=0):
    config = transformer.config
    text = (
        torch.randn(2, 5, config.joint_attention_dim, generator=generator(seed)),
        torch.randn(2, config.pooled_projection_dim, generator=generator(seed)),
    )
    x_t = torch.randn(2, 16, 4, 6, generator=generator(seed))
    return flow.predict_velocity(transformer, x_t, torch.tensor([0.2, 0.9]), text, torch.tensor([1.0, 4.0]))


def encoders():
    return flow.Encoders(
        randomize_(CLIPTextModel(dataclasses.replace(TINY_CLIP, max_position_embeddings=77))), randomize_(T5EncoderModel(TINY_T5))
    )


def test_the_flow_learns_and_leaves_its_encoders_alone():
    batch = flow_batch() | {"t": torch.tensor([0.2, 0.5, 0.8])}
    task = flow.FlowLoss(flow.initialize(FluxTransformer2DModel(MINI)), encoders())
    assert not any(parameter.requires_grad for parameter in task.encoders.parameters())
    with shapes.checks(enabled=False):
        losses = overfit(task, batch, steps=25, rate=2e-2)
    assert losses[0] == pytest.approx(2, abs=0.2)  # of two independent unit normals, with an output of zero
    assert losses[-1] < 0.8 * losses[0]


# ---- growing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow():
    return randomize_(FluxTransformer2DModel(MINI))


def distance(transformer, other):
    """Between what two transformers compute, relative to its size."""
    expected = transformer_call(other)
    assert expected.std() > 0.1
    return ((transformer_call(transformer) - expected).norm() / expected.norm()).item()


def test_growing_with_closed_copies_keeps_the_function(shallow):
    grown = grow.grow(shallow, 5, 7, share=0)
    assert (len(grown.transformer_blocks), len(grown.single_transformer_blocks)) == (5, 7)
    assert (grown.config.num_layers, grown.config.num_single_layers) == (5, 7)
    assert distance(grown, shallow) < 1e-6


def test_the_more_the_copies_do_the_further_is_the_function(shallow):
    near, far = (distance(grow.grow(shallow, 5, 7, share=share), shallow) for share in (0.01, 0.5))
    assert 0 < near < 0.1 * far


def test_copies_that_double_the_work_would_be_noticed(shallow, monkeypatch):
    monkeypatch.setattr(grow, "with_gates", lambda block, strength: block)
    assert distance(grow.grow(shallow, 5, 7, share=0.01), shallow) > 0.1


def test_the_gates_of_a_block_and_its_copies_add_up_to_its_own(shallow):
    grown = grow.grow(shallow, len(shallow.transformer_blocks), 4 * len(shallow.single_transformer_blocks), share=0.3)
    for index, block in enumerate(shallow.single_transformer_blocks):
        family = grown.single_transformer_blocks[4 * index : 4 * index + 4]
        for own, *parts in zip(*map(grow.gates, [block, *family]), strict=True):
            torch.testing.assert_close(torch.stack(parts), own * torch.tensor([0.7, 0.1, 0.1, 0.1]).reshape(4, *[1] * own.ndim))


def test_new_blocks_stand_behind_the_one_that_they_copy():
    blocks = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
    for value, block in enumerate(blocks):
        nn.init.constant_(block.weight, value)
    assert [block.weight.item() for block in grow.grow_list(blocks, 7, 0.3)] == [0, 0, 0, 1, 1, 2, 2]
    assert [block.weight.item() for block in grow.grow_list(blocks, 3, 0.3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot grow 3 blocks to 2"):
        grow.grow_list(blocks, 2, 0.3)


# ---- guidance -----------------------------------------------------------------------------------------------------------


def guidance_batch():
    batch = flow_batch()
    del batch["t"]
    return batch | {
        "levels": torch.tensor([[1.0, 0.5], [0.9, 0.8], [0.6, 0.1]]),
        "no_clip": torch.full((3, 5), 2),
        "no_t5": torch.full((3, 4), 3),
        "guidance": torch.tensor([1.0, 2.5, 6.0]),
    }


def guided_velocity(teacher, text_encoders, batch, x, t):
    """The teacher's, with true guidance."""
    texts = (text_encoders(batch[clip], batch[t5]) for clip, t5 in (("no_clip", "no_t5"), ("clip_ids", "t5_ids")))
    given = (img_ids_of(batch), torch.ones_like(t))
    without, with_text = (flow.predict_packed_velocity(teacher, x, t, text, *given) for text in texts)
    return without + batch["guidance"][:, None, None] * (with_text - without)


@pytest.mark.parametrize("wrong", [1.0, 1.1])
def test_the_student_is_to_say_what_true_guidance_does_wherever_it_goes(shallow, wrong):
    batch, text_encoders = guidance_batch(), encoders()
    student = Recorder(lambda given: wrong * guided_velocity(shallow, text_encoders, batch, given["hidden_states"], given["timestep"]))
    results = guidance.GuidanceLoss(student, shallow, text_encoders)(**batch)
    assert results["off"] == pytest.approx(wrong - 1, rel=1e-3, abs=1e-5)
    first, second = student.calls
    levels = batch["levels"]
    t = levels[:, :1, None, None]
    start = pack_latents((1 - t) * batch["latents"] + t * batch["noise"])
    went = wrong * guided_velocity(shallow, text_encoders, batch, start, levels[:, 0])
    torch.testing.assert_close(first["hidden_states"], start)
    torch.testing.assert_close(second["hidden_states"], start + (levels[:, 1] - levels[:, 0])[:, None, None] * went)
    assert all(torch.equal(call["guidance"], batch["guidance"]) for call in student.calls)
    assert [call["timestep"].tolist() for call in student.calls] == levels.T.tolist()
    # An error counts for less where guidance is strong.
    taught = [guided_velocity(shallow, text_encoders, batch, call["hidden_states"], call["timestep"]) for call in student.calls]
    errors = [((wrong - 1) * each / batch["guidance"][:, None, None]).square().mean() for each in taught]
    torch.testing.assert_close(results["loss"], sum(errors) / 2, rtol=1e-3, atol=1e-9)


def test_only_the_student_learns(shallow):
    student = copy.deepcopy(shallow).requires_grad_(True)
    task = guidance.GuidanceLoss(student, copy.deepcopy(shallow), encoders())
    task(**guidance_batch())["loss"].backward()
    learning = {name.partition(".")[0] for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert learning == {"transformer"}
    # The guidance embedding is among what learns.
    assert student.time_text_embed.guidance_embedder.linear_1.weight.grad.abs().max() > 0


def test_ways_begin_with_noise_or_a_noised_picture_and_have_every_strength(runs, numbered):
    batches = guidance.GuidanceBatches(runs / "scenes", runs / "tokenizers", runs / "numbers.safetensors", batch_size=400)
    batch = batches(0, generator())
    strengths = batch["guidance"]
    assert 0.05 < (strengths == 1).float().mean() < 0.25
    others = strengths[strengths != 1]
    assert 1 < others.min() < 2
    assert guidance.STRONGEST - 1 < others.max() <= guidance.STRONGEST
    assert others.mean() == pytest.approx(3.5, abs=0.2)
    levels = batch["levels"]
    assert levels.shape == (400, guidance.STOPS)
    assert (levels.diff(dim=1) < 0).all()
    assert (levels[::2, 0] == 1).all()
    assert (levels[1::2, 0] < 1).all()
    assert levels.min() > 0
    assert "t" not in batch
    assert torch.equal(batch["no_t5"], numbered.no_t5.expand(400, 32))
    assert torch.equal(batch["no_clip"], numbered.no_clip.expand(400, 77))


# ---- step distillation --------------------------------------------------------------------------------------------------


def step_batch():
    return guidance_batch() | {"level": torch.tensor([0, 1, 3])}


def steps_of(batch):
    return {name: batch[name] for name in ("noise", "level", "clip_ids", "t5_ids", "no_clip", "no_t5")}


@pytest.fixture
def teacher(shallow):
    return copy.deepcopy(shallow)


def test_guidance_folded_into_a_bias_changes_nothing(teacher):
    batch, student = step_batch(), schnell.without_guidance(teacher, schnell.GUIDANCE)
    assert not any("guidance" in name for name, _ in student.named_parameters())
    text, ids = encoders()(batch["clip_ids"], batch["t5_ids"]), img_ids_of(batch)
    x = pack_latents(batch["noise"])
    given = (x, torch.tensor([0.2, 0.5, 0.8]), text, ids)
    torch.testing.assert_close(schnell.velocity(student, *given), schnell.velocity(teacher, *given))
    other = schnell.without_guidance(teacher, 5.0)
    assert (schnell.velocity(other, *given) - schnell.velocity(teacher, *given)).abs().max() > 1e-4


def img_ids_of(batch):
    return prepare_latent_image_ids(batch["noise"].shape[2] // 2, batch["noise"].shape[3] // 2)


def test_one_step_of_the_student_is_to_arrive_where_the_teacher_does(teacher):
    batch, text_encoders = step_batch(), encoders()
    task = schnell.StepLoss(schnell.without_guidance(teacher, 3.5), teacher, text_encoders)
    assert task.sigmas == [1.0, 0.75, 0.5, 0.25, 0.0]
    text, ids = text_encoders(batch["clip_ids"], batch["t5_ids"]), img_ids_of(batch)
    no_text, one = text_encoders(batch["no_clip"], batch["no_t5"]), torch.ones(1)
    losses = []
    for row, level in enumerate(batch["level"].tolist()):
        own, none = (tuple(each[row : row + 1] for each in texts) for texts in (text, no_text))
        x = pack_latents(batch["noise"])[row : row + 1]
        for index in range(level):  # the student's own way down
            sigma = torch.tensor([task.sigmas[index]])
            x = x - 0.25 * schnell.velocity(task.transformer, x, sigma, own, ids)
        end = x
        for index in range(schnell.SUBSTEPS):
            sigma = torch.tensor([task.sigmas[level] - 0.25 * index / schnell.SUBSTEPS])
            without, with_text = (flow.predict_packed_velocity(teacher, end, sigma, each, ids, one) for each in (none, own))
            end = end - 0.25 / schnell.SUBSTEPS * (without + schnell.GUIDANCE * (with_text - without))
        arrived = x - 0.25 * schnell.velocity(task.transformer, x, torch.tensor([task.sigmas[level]]), own, ids)
        losses.append(((arrived - end) / 0.25).square().mean())
    noise = batch["noise"].clone()
    loss = task(**steps_of(batch))["loss"]
    assert loss > 0
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert torch.equal(batch["noise"], noise)


def test_only_the_four_step_student_learns(teacher):
    task = schnell.StepLoss(schnell.without_guidance(teacher, 3.5).requires_grad_(True), teacher, encoders())
    task(**steps_of(step_batch()))["loss"].backward()
    assert {name.partition(".")[0] for name, parameter in task.named_parameters() if parameter.grad is not None} == {"transformer"}


def test_all_four_levels_are_drawn(runs, numbered):
    batches = schnell.StepBatches(runs / "scenes", runs / "tokenizers", runs / "numbers.safetensors", batch_size=400)
    batch = batches(0, generator())
    assert set(batch) == {"noise", "level", "clip_ids", "t5_ids", "no_clip", "no_t5"}
    assert torch.bincount(batch["level"], minlength=schnell.STEPS).min() > 60
