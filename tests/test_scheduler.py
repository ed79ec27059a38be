"""flux_lab.scheduler equals diffusers' FlowMatchEulerDiscreteScheduler, tables and steps, to the last bit."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Reference
from diffusers.pipelines.flux.pipeline_flux import calculate_shift as reference_shift

from flux_lab.config import FLUX_DEV_SCHEDULER, FLUX_SCHNELL_SCHEDULER
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift, default_sigmas

STATIC = dataclasses.replace(FLUX_SCHNELL_SCHEDULER, shift=3.0)
CONFIGS = {
    "dev": FLUX_DEV_SCHEDULER,
    "schnell": FLUX_SCHNELL_SCHEDULER,
    "static": STATIC,
    "linear": dataclasses.replace(FLUX_DEV_SCHEDULER, time_shift_type="linear"),
    "terminal": dataclasses.replace(FLUX_DEV_SCHEDULER, shift_terminal=0.1),
    "stochastic": dataclasses.replace(FLUX_DEV_SCHEDULER, stochastic_sampling=True),
    "other tables": dataclasses.replace(STATIC, num_train_timesteps=700, shift=1.7),
}
SCHEDULES = {
    "1 step": {"num_inference_steps": 1},
    "4 steps": {"num_inference_steps": 4},
    "27 steps": {"num_inference_steps": 27},
    "pipeline's": {"sigmas": default_sigmas(28)},
    "own": {"sigmas": [1.0, 0.8, 0.31, 0.05]},
}


def make_pair(config):
    return FlowMatchEulerDiscreteScheduler(config), Reference.from_config(config.to_dict())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_first_tables(config):
    ours, reference = make_pair(config)
    assert torch.equal(ours.sigmas, reference.sigmas)
    assert torch.equal(ours.timesteps, reference.timesteps)
    assert (ours.sigma_min, ours.sigma_max) == (reference.sigma_min, reference.sigma_max)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tables_and_steps(config, schedule, dtype):
    if config.shift_terminal and schedule.get("num_inference_steps") == 1:
        pytest.skip("upstream divides zero by zero; ours refuses, see test_clear_errors")
    ours, reference = make_pair(config)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(**schedule, mu=0.63)
    assert torch.equal(ours.sigmas, reference.sigmas)
    assert torch.equal(ours.timesteps, reference.timesteps)
    x = y = torch.randn(2, 5, 3).to(dtype)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for timestep in ours.timesteps:
        velocity = torch.randn(2, 5, 3).to(dtype)
        x = ours.step(velocity, timestep, x, generator=generators[0])
        y = reference.step(velocity, timestep, y, generator=generators[1]).prev_sample
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("begin", [None, 2])
def test_scale_noise(begin, dtype):
    ours, reference = make_pair(FLUX_DEV_SCHEDULER)
    sample, noise = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, 4).to(dtype)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(7, mu=0.8)
        if begin is not None:
            scheduler.set_begin_index(begin)
    for timesteps in (ours.timesteps[1:3], ours.timesteps[4:5]):
        assert torch.equal(ours.scale_noise(sample, timesteps, noise), reference.scale_noise(sample, timesteps, noise))


@pytest.mark.parametrize("begin", [None, 1])
def test_where_a_step_begins(begin):
    ours, reference = make_pair(FLUX_DEV_SCHEDULER)
    x = torch.randn(1, 2, 3)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(5, mu=0.8)
        if begin is not None:
            scheduler.set_begin_index(begin)
    timestep = ours.timesteps[2]
    assert torch.equal(ours.step(x, timestep, x), reference.step(x, timestep, x).prev_sample)


@pytest.mark.parametrize("tokens", [1, 64, 256, 1024, 4096, 9000])
def test_calculate_shift(tokens):
    assert calculate_shift(tokens) == reference_shift(tokens)


def test_known_numbers():
    assert round(calculate_shift(1024), 2) == 0.63
    scheduler = FlowMatchEulerDiscreteScheduler(FLUX_SCHNELL_SCHEDULER)
    scheduler.set_timesteps(sigmas=default_sigmas(4))
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    scheduler = FlowMatchEulerDiscreteScheduler(STATIC)
    scheduler.set_timesteps(4)
    assert [round(sigma, 3) for sigma in scheduler.sigmas.tolist()] == [1, 0.858, 0.602, 0.009, 0], "shifted twice, as upstream"


def test_the_swapped_euler_step_is_noticed():
    ours, reference = make_pair(FLUX_DEV_SCHEDULER)
    x, velocity = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(5, mu=0.8)
    wrong = velocity + (ours.sigmas[1] - ours.sigmas[0]) * x
    assert not torch.allclose(wrong, reference.step(velocity, reference.timesteps[0], x).prev_sample)


def test_clear_errors():
    scheduler = FlowMatchEulerDiscreteScheduler(FLUX_DEV_SCHEDULER)
    with pytest.raises(ValueError, match="`mu` is needed"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="num_inference_steps=3, but there are 2 sigmas"):
        scheduler.set_timesteps(3, sigmas=[1.0, 0.5], mu=0.5)
    with pytest.raises(ValueError, match="give `num_inference_steps` or `sigmas`"):
        scheduler.set_timesteps(mu=0.5)
    with pytest.raises(ValueError, match="at least one sigma"):
        scheduler.set_timesteps(sigmas=np.array([]), mu=0.5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        default_sigmas(0)
    with pytest.raises(ValueError, match="1 step cannot be stretched to shift_terminal, expected at least 2 steps"):
        FlowMatchEulerDiscreteScheduler(CONFIGS["terminal"]).set_timesteps(1, mu=0.5)
    scheduler.set_timesteps(1, mu=0.5)
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="got an integer, which looks like an index"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match=r"timestep 123\.0 is not in the schedule of 1 steps"):
        scheduler.step(x, 123.0, x)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="the schedule of 1 steps is at its end"):
        scheduler.step(x, scheduler.timesteps[0], x)
