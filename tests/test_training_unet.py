"""The SD 1.5 example's stages: each learns on a few scenes, writes what the next one reads, and has the target that its docstring says."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import randomize_
from safetensors.torch import load_file, save_file
from torch import nn

from flux_lab import shapes
from flux_lab.checkpoints import load_autoencoder
from flux_lab.clip import CLIPTextModel
from flux_lab.config import TINY_CLIP, TINY_VAE
from flux_lab.sd15.checkpoints import load_unet, save_unet
from flux_lab.sd15.config import MINI_SD_VAE, MINI_UNET, SD15_DDPM, SD15_PNDM, TINY_UNET
from flux_lab.sd15.ddpm import DDPMScheduler
from flux_lab.sd15.noise_schedule import NoiseSchedule
from flux_lab.sd15.pndm import PNDMScheduler
from flux_lab.sd15.unet import UNet2DConditionModel
from flux_lab.training import clip, export_sd15, scenes, texts, tokenizers, unet, vae

pytestmark = [
    # The loop leaves its log open until it is collected, and torch warns of pictures that are mapped read-only.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]

COUNT, CAPTIONS = 6, 2
CLIP = dataclasses.replace(TINY_CLIP, vocab_size=1000, max_position_embeddings=77)
UNET = dataclasses.replace(TINY_UNET, cross_attention_dim=CLIP.hidden_size)
FEW = ["--steps", "2", "--batch", "4"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder as `runs/`: all stages, one after another, two steps each."""
    out = tmp_path_factory.mktemp("runs")
    scenes.write_scenes(out / "scenes", scenes.Settings(count=COUNT, captions=CAPTIONS))
    tokenizers.main(["--scenes", str(out / "scenes"), "--out", str(out / "tokenizers")])
    read = ["--scenes", str(out / "scenes"), "--tokenizers", str(out / "tokenizers")]
    clip.main([*read, "--out", str(out / "clip"), *FEW])
    vae.main(["--scenes", str(out / "scenes"), "--out", str(out / "sd15_vae"), "--generation", "sd15", *FEW])
    unet.main(unet_options(out))
    return out


def unet_options(runs, *more):
    read = ["--scenes", str(runs / "scenes"), "--tokenizers", str(runs / "tokenizers"), "--clip", str(runs / "clip" / "text_encoder")]
    return [*read, "--latents", str(runs / "sd15_vae" / "latents.safetensors"), "--out", str(runs / "unet"), *FEW, *more]


# ---- the presets and what the commands leave ----------------------------------------------------------------------------


def test_the_presets_fit_together():
    with torch.device("meta"):
        small = UNet2DConditionModel(MINI_UNET)
    assert 3e6 < sum(parameter.numel() for parameter in small.parameters()) < 4e6
    assert MINI_UNET.sample_size * MINI_SD_VAE.vae_scale_factor == MINI_SD_VAE.sample_size
    assert MINI_UNET.in_channels == MINI_SD_VAE.latent_channels == 4
    assert MINI_UNET.cross_attention_dim == 64


@pytest.mark.parametrize("stage", ["sd15_vae", "unet"])
def test_every_stage_logs_finite_losses(runs, stage):
    lines = [json.loads(line) for line in (runs / stage / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_the_unet_is_a_plain_diffusers_folder(runs):
    assert sorted(path.name for path in (runs / "unet" / "unet").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert load_unet(runs / "unet" / "unet").config == MINI_UNET


def test_a_run_that_is_started_again_goes_on(runs):
    file = runs / "unet" / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_file(file)
    unet.main(unet_options(runs))
    after = load_file(file)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_parts_become_a_checkpoint(runs, tmp_path):
    parts = {"unet": runs / "unet" / "unet", "vae": runs / "sd15_vae" / "vae", "clip": runs / "clip" / "text_encoder"}
    pipe = export_sd15.export(**parts, tokenizer=runs / "tokenizers" / "tokenizer", out=tmp_path)
    assert pipe("a red cube", num_inference_steps=2).images[0].size == (128, 128)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) < 15e6


def test_a_run_starts_from_a_given_unet(runs, tmp_path):
    given = randomize_(load_unet(runs / "unet" / "unet"))
    save_unet(given, tmp_path / "given")
    unet.main(
        [*unet_options(runs), "--out", str(tmp_path), "--initial", str(tmp_path / "given"), "--steps", "1", "--rate", "0", "--ema", "0"]
    )
    expected = given.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_unet(tmp_path / "unet").state_dict().items())


# ---- the autoencoder ----------------------------------------------------------------------------------------------------


def test_four_channel_latents_have_deviation_1_and_no_shift(runs):
    autoencoder = load_autoencoder(runs / "sd15_vae" / "vae")
    config = autoencoder.config
    assert config == dataclasses.replace(MINI_SD_VAE, scaling_factor=config.scaling_factor)
    assert config.scaling_factor != MINI_SD_VAE.scaling_factor
    latents = load_file(runs / "sd15_vae" / "latents.safetensors")["latents"]
    assert latents.shape == (COUNT, 4, 16, 16)
    assert latents.float().std() == pytest.approx(1, abs=0.01)
    picture = vae.to_tensor(np.array(scenes.read_images(runs / "scenes")[3:4]))
    with torch.no_grad():
        expected = autoencoder.encode(picture).mean * config.scaling_factor
    torch.testing.assert_close(latents[3:4].float(), expected, rtol=5e-3, atol=5e-3)


def test_only_the_factor_is_measured_where_there_is_no_shift():
    latents = 3 + 2 * torch.randn(20, 4, 8, 8, generator=generator())
    config = vae.measured_scaling(MINI_SD_VAE, latents)
    assert config.shift_factor is None
    assert config.scaling_factor == pytest.approx(0.5, abs=0.02)


def test_the_autoencoder_with_quant_convolutions_begins_quiet():
    task = vae.VAELoss(dataclasses.replace(TINY_VAE, latent_channels=4, use_quant_conv=True, use_post_quant_conv=True))
    with torch.no_grad():
        logvar = task.vae.encode(torch.rand(2, 3, 64, 64, generator=generator())).logvar
    assert logvar.mean() == pytest.approx(vae.FIRST_LOGVAR, abs=1)


# ---- the UNet -----------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """In the UNet's place: notes what it is given and answers with `answer`."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, *arguments):
        self.calls.append(arguments)
        return self.answer


def make_clip():
    return randomize_(CLIPTextModel(CLIP))


def noise_batch(count=3):
    latents, noise = torch.randn(2, count, 4, 6, 8, generator=generator())
    return {
        "latents": latents,
        "noise": noise,
        "timesteps": torch.tensor([0, 400, 999]),
        "clip_ids": torch.randint(1000, (count, 77), generator=generator()),
    }


@pytest.mark.parametrize(("sign", "learned"), [(1, True), (-1, False)])
def test_the_target_is_the_noise(sign, learned):
    batch = noise_batch()
    loss = unet.NoiseLoss(Recorder(sign * batch["noise"]), make_clip(), NoiseSchedule(SD15_DDPM))(**batch)["loss"]
    assert (loss.item() == 0) == learned


def test_the_network_sees_the_noisy_latents_and_every_token():
    batch, recorder, encoder = noise_batch(), Recorder(torch.zeros(3, 4, 6, 8)), make_clip()
    unet.NoiseLoss(recorder, encoder, NoiseSchedule(SD15_DDPM))(**batch)
    ((x_t, timesteps, text),) = recorder.calls
    kept = torch.tensor(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[[0, 400, 999]], dtype=torch.float32)
    kept = kept[:, None, None, None]
    torch.testing.assert_close(x_t, kept**0.5 * batch["latents"] + (1 - kept) ** 0.5 * batch["noise"], rtol=1e-4, atol=1e-4)
    assert torch.equal(timesteps, batch["timesteps"])
    assert torch.equal(text, encoder(batch["clip_ids"]).last_hidden_state)


@pytest.mark.parametrize("scheduler", [PNDMScheduler(SD15_PNDM), DDPMScheduler(SD15_DDPM)], ids=lambda each: type(each).__name__)
def test_the_samplers_walk_back_to_the_picture(scheduler):
    """Given the noise that is in the sample, which is the target, every step's estimate and the last step are the picture."""
    batch = noise_batch(1)
    scheduler.set_timesteps(8)
    sample = scheduler.add_noise(batch["latents"], batch["noise"], scheduler.timesteps[:1])
    for timestep in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[timestep]
        noise = batch["noise"] if isinstance(scheduler, PNDMScheduler) else (sample - kept**0.5 * batch["latents"]) / (1 - kept) ** 0.5
        torch.testing.assert_close(scheduler.predict_original_sample(noise, timestep, sample), batch["latents"], rtol=1e-3, atol=1e-3)
        sample = scheduler.step(noise, timestep, sample)
    # PNDM stops at timestep 0's noise level, DDPM at the picture.
    start = scheduler.add_noise(batch["latents"], batch["noise"], torch.tensor([0]))
    torch.testing.assert_close(sample, start if isinstance(scheduler, PNDMScheduler) else batch["latents"], rtol=1e-3, atol=1e-3)


def test_batches_pair_latents_with_their_captions(runs, tmp_path):
    save_file({"latents": torch.arange(COUNT).half()[:, None, None, None].expand(COUNT, 4, 2, 2).contiguous()}, tmp_path / "numbers")
    batches = unet.NoiseBatches(runs / "scenes", runs / "tokenizers", tmp_path / "numbers", NoiseSchedule(SD15_DDPM), batch_size=1500)
    batch, again, other = (batches(0, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["noise"], other["noise"])
    empty = (batch["clip_ids"] == batches.no_clip).all(dim=1)
    assert empty.float().mean() == pytest.approx(unet.DROP_TEXT, abs=0.03)
    scene = batch["latents"][:, 0, 0, 0].long()
    assert set(scene.tolist()) == set(range(COUNT))
    own = texts.caption_ids(runs / "scenes", runs / "tokenizers").clip[scene]
    assert ((batch["clip_ids"][:, None] == own).all(dim=-1).any(dim=1) | empty).all()
    assert (batch["timesteps"].min(), batch["timesteps"].max()) == (pytest.approx(0, abs=9), pytest.approx(999, abs=9))
    assert batch["timesteps"].float().mean() == pytest.approx(499.5, abs=30)


def test_every_residual_branch_of_a_new_unet_is_silent():
    torch.manual_seed(0)
    new = unet.initialize(UNet2DConditionModel(UNET))
    seen = []
    for name in ("down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "mid_block.resnets.1"):
        new.get_submodule(name).register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
    assert not new(torch.randn(2, 4, 8, 8), 500, torch.randn(2, 5, CLIP.hidden_size)).any()
    assert len(seen) == 3
    for given, output in seen:
        torch.testing.assert_close(output, given)


def test_the_unet_learns_and_leaves_clip_alone():
    torch.manual_seed(0)
    task = unet.NoiseLoss(unet.initialize(UNet2DConditionModel(UNET)), make_clip(), NoiseSchedule(SD15_DDPM))
    assert not any(parameter.requires_grad for parameter in task.clip.parameters())
    batch = noise_batch()
    optimizer = torch.optim.AdamW(task.unet.parameters(), lr=1e-2)
    losses = []
    with shapes.checks(enabled=False):
        for _ in range(20):
            loss = task(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.2)  # of unit noise, with an output of zero
    assert losses[-1] < 0.8 * losses[0]
