"""flux_lab.sd15.ddpm equals diffusers' DDPMScheduler, tables and steps, to the last bit."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler as Reference

from flux_lab.sd15.config import SD15_DDPM, DDPMSchedulerConfig
from flux_lab.sd15.ddpm import DDPMScheduler
from flux_lab.shapes import ShapeError

CONFIGS = {
    "sd15": SD15_DDPM,
    "upstream's default": DDPMSchedulerConfig(),
    "v": dataclasses.replace(SD15_DDPM, prediction_type="v_prediction", clip_sample=True, clip_sample_range=0.7),
    "sample": dataclasses.replace(SD15_DDPM, prediction_type="sample", timestep_spacing="trailing"),
    "large variance": dataclasses.replace(SD15_DDPM, variance_type="fixed_large", timestep_spacing="linspace"),
}
SCHEDULES = {"1": [1], "4": [4], "7": [7], "own": [None, None, [900, 500, 499, 3, 0]]}


def make_pair(config):
    return DDPMScheduler(config), Reference.from_config(config.to_dict())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_timesteps_and_steps(config, schedule, dtype):
    ours, reference = make_pair(config)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(*schedule)
    assert torch.equal(ours.timesteps, reference.timesteps)
    x = y = torch.randn(2, 4, 5, 3).to(dtype)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for timestep in ours.timesteps:
        output = torch.randn(2, 4, 5, 3).to(dtype)
        expected = reference.step(output, timestep, y, generator=generators[1])
        if not config.clip_sample:
            assert torch.equal(ours.predict_original_sample(output, timestep, x), expected.pred_original_sample)
        x, y = ours.step(output, timestep, x, generator=generators[0]), expected.prev_sample
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_thousand_steps(config):
    """Without `set_timesteps`, as it was trained."""
    ours, reference = make_pair(config)
    x = torch.randn(1, 4, 2, 3)
    for timestep in (999, 500, 1, 0):
        assert ours.previous_timestep(timestep) == timestep - 1
        results = [scheduler.step(0.3 * x, timestep, x, generator=torch.Generator().manual_seed(1)) for scheduler in (ours, reference)]
        assert torch.equal(results[0], results[1].prev_sample)


def test_each_picture_its_own_generator():
    ours, reference = make_pair(SD15_DDPM)
    x = torch.randn(2, 4, 5, 3)
    results = [
        scheduler.step(x, 400, x, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)]) for scheduler in (ours, reference)
    ]
    assert torch.equal(results[0], results[1].prev_sample)


def test_a_perfect_network_leads_to_the_picture():
    scheduler = DDPMScheduler(SD15_DDPM)
    scheduler.set_timesteps(20)
    picture = torch.randn(1, 4, 5, 3)
    x = torch.randn(1, 4, 5, 3)
    for timestep in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[timestep]
        noise = (x - kept**0.5 * picture) / (1 - kept) ** 0.5
        x = scheduler.step(noise, timestep, x)
    torch.testing.assert_close(x, picture, rtol=1e-4, atol=1e-4)


def test_clear_errors():
    scheduler = DDPMScheduler(SD15_DDPM)
    x = torch.zeros(1, 4, 5, 3)
    for arguments in ([], [4, None, [3, 1]]):
        with pytest.raises(ValueError, match="give either `num_inference_steps` or `timesteps`"):
            scheduler.set_timesteps(*arguments)
    for timesteps in ([3, 3], [1, 2], []):
        with pytest.raises(ValueError, match="expected a descending list of `timesteps`"):
            scheduler.set_timesteps(timesteps=timesteps)
    with pytest.raises(ValueError, match="timesteps must lie in 0"):
        scheduler.set_timesteps(timesteps=[1000, 5])
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 750 is not in the schedule of 4 steps"):
        scheduler.step(x, 750, x)
    with pytest.raises(ShapeError, match=r"step: argument `sample`: .* got float32 \[1, 4, 5, 2\]"):
        scheduler.step(x, 751, x[..., :2])


def _weights_exchanged(self, timestep):
    return torch.tensor(1.0) - self.alphas_cumprod[timestep]


def _no_clamp(self, timestep):
    return (1 - self._kept(self.previous_timestep(timestep))) / (1 - self.alphas_cumprod[int(timestep)])


@pytest.mark.parametrize(("name", "bug"), [("_kept", _weights_exchanged), ("variance", _no_clamp)])
def test_planted_bugs_are_found(name, bug, monkeypatch):
    monkeypatch.setattr(DDPMScheduler, name, bug)
    with pytest.raises(AssertionError):
        test_timesteps_and_steps(SD15_DDPM, [4], torch.float32)
