"""flux_lab.sd15.pndm equals diffusers' PNDMScheduler, timesteps and steps, to the last bit."""

import dataclasses

import pytest
import torch
from diffusers import PNDMScheduler as Reference

from flux_lab.sd15 import pndm
from flux_lab.sd15.config import SD15_PNDM, PNDMSchedulerConfig
from flux_lab.sd15.pndm import PNDMScheduler, multistep_slope
from flux_lab.shapes import ShapeError

RUNGE_KUTTA = dataclasses.replace(SD15_PNDM, skip_prk_steps=False)
CONFIGS = {
    "sd15": SD15_PNDM,
    "runge-kutta": RUNGE_KUTTA,
    "upstream's default": PNDMSchedulerConfig(),
    "v": dataclasses.replace(SD15_PNDM, prediction_type="v_prediction", set_alpha_to_one=True),
    "v, runge-kutta": dataclasses.replace(RUNGE_KUTTA, prediction_type="v_prediction", timestep_spacing="trailing"),
    "linspace": dataclasses.replace(SD15_PNDM, timestep_spacing="linspace", num_train_timesteps=700),
}


def make_pair(config, steps):
    pair = PNDMScheduler(config), Reference.from_config(config.to_dict())
    for scheduler in pair:
        scheduler.set_timesteps(steps)
    return pair


def walk(ours, reference, dtype):
    """All steps of both, compared."""
    x = y = torch.randn(2, 4, 5, 3).to(dtype)
    for timestep in ours.timesteps:
        output = torch.randn(2, 4, 5, 3).to(dtype)
        x = ours.step(output, timestep, x)
        y = reference.step(output, timestep, y).prev_sample
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
        assert ours.counter == reference.counter


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_timesteps_and_steps(config, steps, dtype):
    if not config.skip_prk_steps and steps < 4:
        pytest.skip("upstream fails in numpy; ours refuses, see test_clear_errors")
    ours, reference = make_pair(config, steps)
    for name in ("timesteps", "prk_timesteps", "plms_timesteps"):
        assert torch.as_tensor(getattr(ours, name)).tolist() == torch.as_tensor(getattr(reference, name)).tolist(), name
    walk(ours, reference, dtype)


@pytest.mark.parametrize("config", [SD15_PNDM, RUNGE_KUTTA], ids=["plms", "prk"])
def test_set_timesteps_starts_again(config):
    ours, reference = make_pair(config, 6)
    walk(ours, reference, torch.float32)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(5)
    walk(ours, reference, torch.float32)


def test_a_start_in_the_middle():
    """As image to image does: the counting of slopes begins where the walk begins."""
    ours, reference = make_pair(SD15_PNDM, 8)
    x = y = torch.randn(1, 4, 5, 3)
    for timestep in ours.timesteps[4:]:
        x, y = ours.step(0.5 * x, timestep, x), reference.step(0.5 * y, timestep, y).prev_sample
        assert torch.equal(x, y)


def test_the_table():
    for name in ("betas", "alphas_cumprod", "final_alpha_cumprod"):
        assert torch.equal(getattr(PNDMScheduler(SD15_PNDM), name), getattr(make_pair(SD15_PNDM, 4)[1], name))


def test_known_numbers():
    scheduler, _ = make_pair(SD15_PNDM, 4)
    assert scheduler.timesteps.tolist() == [751, 501, 501, 251, 1]
    scheduler, _ = make_pair(RUNGE_KUTTA, 5)
    assert scheduler.timesteps.tolist() == [801, 701, 701, 601, 601, 501, 501, 401, 401, 301, 301, 201, 201, 1]
    assert len(make_pair(SD15_PNDM, 50)[0].timesteps) == 51


def test_a_constant_slope_stays_itself():
    for known in range(1, 5):
        torch.testing.assert_close(multistep_slope([torch.tensor(0.7)] * known), torch.tensor(0.7))


def test_a_perfect_network_leads_to_the_picture():
    """With the same noise predicted everywhere each step is exact; the end is the picture, with timestep 0's noise."""
    scheduler = PNDMScheduler(SD15_PNDM)
    scheduler.set_timesteps(5)
    picture, noise = torch.randn(1, 4, 5, 3), torch.randn(1, 4, 5, 3)
    x = scheduler.add_noise(picture, noise, scheduler.timesteps[:1])
    for timestep in scheduler.timesteps:
        x = scheduler.step(noise, timestep, x)
    torch.testing.assert_close(x, scheduler.add_noise(picture, noise, torch.tensor([0])), rtol=1e-4, atol=1e-4)


def test_clear_errors():
    x = torch.zeros(1, 4, 5, 3)
    for call in (PNDMScheduler().step, PNDMScheduler().step_prk, PNDMScheduler().step_plms):
        with pytest.raises(ValueError, match="call `set_timesteps` first"):
            call(x, 1, x)
    scheduler = PNDMScheduler(RUNGE_KUTTA)
    with pytest.raises(ValueError, match="num_inference_steps=3, expected at least 4, because the first 3 are Runge-Kutta's"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="between 1 and num_train_timesteps=1000, got 0"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="step_plms: 0 slopes are known, expected 3"):
        scheduler.step_plms(x, scheduler.timesteps[0], x)
    scheduler, _ = make_pair(SD15_PNDM, 1)
    with pytest.raises(ValueError, match="timestep 2 is not in the schedule of 1 steps"):
        scheduler.step(x, 2, x)
    with pytest.raises(ShapeError, match=r"step: argument `sample`: .* got float32 \[1, 4, 5\]"):
        scheduler.step(x, 1, x[..., 0])
    scheduler.step(x, 1, x)
    with pytest.raises(ValueError, match="the schedule of 1 evaluations is at its end"):
        scheduler.step(x, 1, x)


def _newest_only(slopes):
    return slopes[-1]


def _epsilon_whatever_it_is(self, sample, timestep, target, model_output, transfer=PNDMScheduler._transfer):
    epsilon = dataclasses.replace(self.config, prediction_type="epsilon")
    return transfer(PNDMScheduler(epsilon), sample, timestep, target, model_output)


@pytest.mark.parametrize(
    ("place", "name", "bug", "config"),
    [
        (pndm, "multistep_slope", _newest_only, "sd15"),
        (pndm, "multistep_slope", _newest_only, "runge-kutta"),
        (PNDMScheduler, "_transfer", _epsilon_whatever_it_is, "v"),
    ],
)
def test_planted_bugs_are_found(place, name, bug, config, monkeypatch):
    monkeypatch.setattr(place, name, bug)
    with pytest.raises(AssertionError):
        test_timesteps_and_steps(CONFIGS[config], 9, torch.float32)
