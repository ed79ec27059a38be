"""flux_lab.sd15.noise_schedule equals diffusers': tables, forward process and spacing, to the last bit."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler as Reference

from flux_lab.sd15 import noise_schedule
from flux_lab.sd15.config import SD15_DDPM, DDPMSchedulerConfig, PNDMSchedulerConfig
from flux_lab.sd15.ddpm import DDPMScheduler
from flux_lab.sd15.noise_schedule import spaced_timesteps
from flux_lab.sd15.pndm import PNDMScheduler
from flux_lab.shapes import ShapeError

CONFIGS = {
    "sd15": SD15_DDPM,
    "linear": DDPMSchedulerConfig(),
    "short": dataclasses.replace(SD15_DDPM, num_train_timesteps=700, beta_start=0.001, beta_end=0.03),
}


def make_pair(config):
    return DDPMScheduler(config), Reference.from_config(config.to_dict())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tables(config):
    ours, reference = make_pair(config)
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(ours, name), getattr(reference, name)), name


@pytest.mark.parametrize("timesteps", [[0, 499, 699], [250]], ids=["each its own", "one for all"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_process(config, timesteps, dtype):
    ours, reference = make_pair(config)
    picture, noise = torch.randn(3, 4, 5, 6).to(dtype), torch.randn(3, 4, 5, 6).to(dtype)
    timesteps = torch.tensor(timesteps)
    assert torch.equal(ours.add_noise(picture, noise, timesteps), reference.add_noise(picture, noise, timesteps))
    assert torch.equal(ours.get_velocity(picture, noise, timesteps), reference.get_velocity(picture, noise, timesteps))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_finds_the_picture(prediction_type):
    scheduler = DDPMScheduler(dataclasses.replace(SD15_DDPM, prediction_type=prediction_type))
    picture, noise = torch.randn(1, 4, 5, 6), torch.randn(1, 4, 5, 6)
    for timestep in (0, 300, 800):
        noisy = scheduler.add_noise(picture, noise, torch.tensor([timestep]))
        velocity = scheduler.get_velocity(picture, noise, torch.tensor([timestep]))
        output = {"epsilon": noise, "v_prediction": velocity, "sample": picture}[prediction_type]
        torch.testing.assert_close(scheduler.predict_original_sample(output, timestep, noisy), picture, rtol=1e-4, atol=1e-4)


def test_both_schedulers_share_it():
    pndm = PNDMScheduler(PNDMSchedulerConfig())
    ddpm = DDPMScheduler(DDPMSchedulerConfig())
    assert torch.equal(pndm.alphas_cumprod, ddpm.alphas_cumprod)


def test_known_numbers():
    """SD 1.5 never sees pure noise: at the last timestep 6.8 % of the picture's amplitude is left."""
    kept = DDPMScheduler(SD15_DDPM).alphas_cumprod
    assert round(kept[-1].item() ** 0.5, 3) == 0.068
    assert round(kept[0].item(), 5) == 0.99915
    config = dataclasses.replace(SD15_DDPM, steps_offset=1)
    assert spaced_timesteps(config, 4).tolist() == [1, 251, 501, 751]
    assert spaced_timesteps(dataclasses.replace(config, timestep_spacing="trailing"), 4).tolist() == [249, 499, 749, 999]
    assert spaced_timesteps(dataclasses.replace(config, timestep_spacing="linspace"), 4).tolist() == [0, 333, 666, 999]


def test_clear_errors():
    scheduler = DDPMScheduler(SD15_DDPM)
    x = torch.zeros(2, 4, 5, 6)
    with pytest.raises(ValueError, match=r"timesteps must lie in 0 \.\.\. 999, got -1 \.\.\. 7"):
        scheduler.add_noise(x, x, torch.tensor([7, -1]))
    with pytest.raises(ValueError, match=r"got 1000 \.\.\. 1000"):
        scheduler.get_velocity(x, x, torch.tensor([1000]))
    with pytest.raises(ShapeError, match=r"add_noise: argument `timesteps`: expected int \[#batch\], got int64 \[3\]"):
        scheduler.add_noise(x, x, torch.tensor([1, 2, 3]))
    with pytest.raises(ShapeError, match=r"add_noise: argument `noise`: .*batch=2.* got float32 \[1, 4, 5, 6\]"):
        scheduler.add_noise(x, x[:1], torch.tensor([1]))
    with pytest.raises(ValueError, match="between 1 and num_train_timesteps=1000, got 0"):
        spaced_timesteps(SD15_DDPM, 0)
    with pytest.raises(ValueError, match="got 1001"):
        spaced_timesteps(SD15_DDPM, 1001)
    with pytest.raises(ValueError, match="steps_offset=1 leads 1000 steps to timestep 1000, expected at most 999"):
        spaced_timesteps(SD15_DDPM, 1000)


def _evenly_spaced_betas(config):
    return torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)


def test_planted_bug_in_the_betas_is_found(monkeypatch):
    monkeypatch.setattr(noise_schedule, "make_betas", _evenly_spaced_betas)
    with pytest.raises(AssertionError):
        test_tables(SD15_DDPM)


def test_planted_bug_in_the_roots_is_found(monkeypatch):
    weights = DDPMScheduler._weights
    monkeypatch.setattr(DDPMScheduler, "_weights", lambda *args, **like: tuple(weight**2 for weight in weights(*args, **like)))
    with pytest.raises(AssertionError):
        test_forward_process(SD15_DDPM, [0, 499, 699], torch.float32)
