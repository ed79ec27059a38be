"""DDPM: sampling by undoing the noise at random, one timestep after the other.

A step estimates the picture, and draws x_{t-1} from the Gaussian around a mixture of that estimate and x_t. Source: Ho et al. 2020,
arXiv 2006.11239, equations 6, 7 and 15; diffusers `scheduling_ddpm.py`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flux_lab.latents import prepare_noise
from flux_lab.sd15.config import DDPMSchedulerConfig
from flux_lab.sd15.noise_schedule import NoiseSchedule, spaced_timesteps
from flux_lab.shapes import shaped

SMALLEST_VARIANCE = 1e-20


class DDPMScheduler(NoiseSchedule):
    """`set_timesteps` chooses the descending `timesteps`, all 1000 before it is called; `step` goes from one to the next."""

    CONFIG = DDPMSchedulerConfig

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose a number of steps, spaced as the config says, or descending `timesteps` of one's own. Raises ValueError."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps: give either `num_inference_steps` or `timesteps`")
        if timesteps is None:
            chosen = spaced_timesteps(self.config, num_inference_steps)[::-1].copy()
        else:
            chosen = np.array(timesteps, dtype=np.int64)
            if chosen.ndim != 1 or not len(chosen) or (np.diff(chosen) >= 0).any():
                raise ValueError(f"set_timesteps: expected a descending list of `timesteps`, got {list(timesteps)}")
        self._check_range(torch.from_numpy(chosen))
        self.timesteps = torch.from_numpy(chosen).to(device)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that a step from `timestep` leads to; -1, a picture without noise, after the last. Raises ValueError."""
        timestep = self._check_scheduled(timestep)
        index = int((self.timesteps == timestep).nonzero()[0])
        return -1 if index + 1 == len(self.timesteps) else int(self.timesteps[index + 1])

    @shaped
    def step(
        self,
        model_output: Float[Tensor, "batch channels height width"],
        timestep: int | Int[Tensor, ""],
        sample: Float[Tensor, "batch channels height width"],
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """One step: the mean of x_{t-1} given x_t and the estimated picture (equation 7), and, except at timestep 0, fresh noise.

        `timestep` is one of `timesteps`, not its index. Raises ValueError.
        """
        previous = self.previous_timestep(timestep)
        kept = self.alphas_cumprod[int(timestep)]
        kept_previous = self._kept(previous)
        alpha = kept / kept_previous
        picture = self.predict_original_sample(model_output, timestep, sample)
        if self.config.clip_sample:
            picture = picture.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        picture_weight = kept_previous**0.5 * (1 - alpha) / (1 - kept)
        sample_weight = alpha**0.5 * (1 - kept_previous) / (1 - kept)
        mean = picture_weight * picture + sample_weight * sample
        if int(timestep) == 0:
            return mean
        noise = prepare_noise(tuple(model_output.shape), generator, model_output.dtype, model_output.device)
        return mean + self.variance(timestep) ** 0.5 * noise

    def variance(self, timestep: int | Tensor) -> Tensor:
        """Variance of the noise that a step from `timestep` adds, a float32 number.

        "fixed_small" is right for data that is a single point, "fixed_large" for standard normal data (Ho et al. 2020, section 3.2).
        """
        kept, kept_previous = self.alphas_cumprod[int(timestep)], self._kept(self.previous_timestep(timestep))
        beta = 1 - kept / kept_previous
        if self.config.variance_type == "fixed_large":
            return beta
        return ((1 - kept_previous) / (1 - kept) * beta).clamp(min=SMALLEST_VARIANCE)

    def _kept(self, timestep: int) -> Tensor:
        """a_t, and 1 for the picture without noise."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else torch.tensor(1.0)
