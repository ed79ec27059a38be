"""The flow-matching Euler scheduler: which noise levels (sigmas) to visit, and one step from each to the next.

The path from a picture x0 to noise n is a straight line, x(sigma) = (1 - sigma) x0 + sigma n, and the network predicts its
direction, the velocity n - x0. Sampling walks from sigma = 1 down to 0. Source: Rectified Flow (Liu et al. 2022, arXiv 2209.03003),
Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, section 5.3.2 for the shift), diffusers `FlowMatchEulerDiscreteScheduler`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flux_lab.config import FlowMatchEulerDiscreteSchedulerConfig
from flux_lab.shapes import shaped


def calculate_shift(
    image_seq_len: int, base_seq_len: int = 256, max_seq_len: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """mu: the straight line through (256 tokens, 0.5) and (4096 tokens, 1.15), at `image_seq_len` tokens, also beyond its ends."""
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return image_seq_len * slope + (base_shift - slope * base_seq_len)


def default_sigmas(num_inference_steps: int) -> np.ndarray:
    """The pipeline's unshifted sigmas: 1, ..., 1/steps, evenly spaced, float64. Without the final 0."""
    if not isinstance(num_inference_steps, int):
        raise TypeError(f"num_inference_steps: expected a whole number, got {type(num_inference_steps).__name__}")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)


class FlowMatchEulerDiscreteScheduler:
    """Euler's method on the straight path.

    `set_timesteps` makes `sigmas` [steps + 1], ending with 0, and `timesteps` [steps] = 1000 * sigma; `step` takes one step.
    """

    def __init__(self, config: FlowMatchEulerDiscreteSchedulerConfig | None = None):
        self.config = config or FlowMatchEulerDiscreteSchedulerConfig()
        steps = self.config.num_train_timesteps
        sigmas = np.linspace(1, steps, steps, dtype=np.float32)[::-1] / np.float32(steps)
        if not self.config.use_dynamic_shifting:
            sigmas = self._static_shift(sigmas)
        self._set_tables(torch.from_numpy(sigmas.copy()))
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-1].item()

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "FlowMatchEulerDiscreteScheduler":
        """From an upstream `scheduler_config.json`, already parsed."""
        return cls(FlowMatchEulerDiscreteSchedulerConfig.from_dict(values))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        mu: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Choose the noise levels: `sigmas`, unshifted and without the final 0, or else a number of steps.

        `mu` is needed with dynamic shifting. Known quirk, kept: with a static shift and no `sigmas` the shift is applied twice
        (shift 3 and 4 steps: 1, .858, .602, .009), because the end points come from the table that is shifted already; the
        pipeline always passes `sigmas`. Raises ValueError for a missing mu, for no steps, and when both disagree.
        """
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("set_timesteps: `mu` is needed because use_dynamic_shifting is on; compute it with `calculate_shift`")
        if sigmas is None and num_inference_steps is None:
            raise ValueError("set_timesteps: give `num_inference_steps` or `sigmas`")
        if sigmas is not None and num_inference_steps not in (None, len(sigmas)):
            raise ValueError(f"set_timesteps: num_inference_steps={num_inference_steps}, but there are {len(sigmas)} sigmas")
        steps = self.config.num_train_timesteps
        if sigmas is None:
            levels = np.linspace(self.sigma_max * steps, self.sigma_min * steps, num_inference_steps) / steps
        else:
            levels = np.asarray(sigmas, dtype=np.float32)
        if levels.ndim != 1 or not len(levels):
            raise ValueError(f"set_timesteps: expected a list of at least one sigma, got shape {list(levels.shape)}")
        levels = self.time_shift(mu, levels) if self.config.use_dynamic_shifting else self._static_shift(levels)
        if self.config.shift_terminal:
            levels = self._stretch_to_terminal(levels)
        self._set_tables(torch.from_numpy(levels).to(dtype=torch.float32, device=device))
        self.sigmas = torch.cat([self.sigmas, self.sigmas.new_zeros(1)])

    def _set_tables(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas
        self.timesteps = sigmas * self.config.num_train_timesteps
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def time_shift(self, mu: float, sigmas: np.ndarray) -> np.ndarray:
        """Move sigmas towards 1 by mu: e^mu / (e^mu + (1/sigma - 1)), or mu in place of e^mu with time_shift_type "linear"."""
        strength = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return strength / (strength + (1 / sigmas - 1))

    def _static_shift(self, sigmas: np.ndarray) -> np.ndarray:
        """The same curve with a fixed strength: shift * sigma / (1 + (shift - 1) sigma)."""
        shift = self.config.shift
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def _stretch_to_terminal(self, sigmas: np.ndarray) -> np.ndarray:
        """Stretch the schedule linearly, with 1 fixed, so that its last value is `shift_terminal`."""
        distance = 1 - sigmas
        if distance[-1] == 0:
            raise ValueError(
                f"set_timesteps: a schedule of {len(sigmas)} step cannot be stretched to shift_terminal, expected at least 2 steps"
            )
        return 1 - distance / (distance[-1] / (1 - self.config.shift_terminal))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of the schedule: 0 for text to image, later for image to image."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Where `timestep` stands in the schedule; the second place if it stands there twice, as upstream. Raises ValueError."""
        places = (self.timesteps == timestep).nonzero()
        if not len(places):
            raise ValueError(
                f"timestep {float(timestep)} is not in the schedule of {len(self.timesteps)} steps: pass one of `scheduler.timesteps`"
            )
        return places[1 if len(places) > 1 else 0].item()

    @shaped
    def step(
        self,
        velocity: Float[Tensor, "*shape"],
        timestep: int | float | Float[Tensor, ""],
        sample: Float[Tensor, "*shape"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*shape"]:
        """One Euler step, x + (sigma_next - sigma) v, computed in float32, returned in the velocity's dtype.

        With `stochastic_sampling`: estimate the picture, then add fresh noise of the next level. `timestep` is one of
        `timesteps`, not its index: an integer raises ValueError; so does a step after the last.
        """
        if isinstance(timestep, int):
            raise ValueError("step: expected one of `scheduler.timesteps` as `timestep`, got an integer, which looks like an index")
        if self.step_index is None:
            self.step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        if self.step_index + 1 >= len(self.sigmas):
            raise ValueError(f"step: the schedule of {len(self.timesteps)} steps is at its end; call `set_timesteps` to start again")
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        sample = sample.float()
        if self.config.stochastic_sampling:
            picture = sample - sigma * velocity
            noise = torch.randn(sample.shape, generator=generator, device=generator.device if generator else sample.device)
            moved = (1 - sigma_next) * picture + sigma_next * noise.to(sample.device)
        else:
            moved = sample + (sigma_next - sigma) * velocity
        self.step_index += 1
        return moved.to(velocity.dtype)

    @shaped
    def scale_noise(
        self, sample: Float[Tensor, "batch *shape"], timestep: Float[Tensor, "levels"], noise: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        """The forward process: sigma * noise + (1 - sigma) * sample, at one timestep for all or one for each of the batch."""
        if self.begin_index is None:
            places = [self.index_for_timestep(each) for each in timestep]
        else:
            places = [self.begin_index if self.step_index is None else self.step_index] * len(timestep)
        sigma = self.sigmas.to(device=sample.device, dtype=sample.dtype)[places]
        sigma = sigma.reshape(len(places), *[1] * (sample.ndim - 1))
        return sigma * noise + (1 - sigma) * sample
