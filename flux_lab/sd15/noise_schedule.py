"""The noise schedule of diffusion: how much of the picture is left at each of 1000 timesteps, and what follows from it.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) n, with a_t the product of (1 - beta) up to t: the squares of both weights add up to one, where
FLUX's weights themselves do (scheduler.py). Source: Ho et al. 2020, arXiv 2006.11239, equation 4; Salimans & Ho 2022, arXiv
2202.00512, for v; diffusers `scheduling_ddpm.py`, `scheduling_pndm.py`.
"""

from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flux_lab.sd15.config import NoiseScheduleConfig
from flux_lab.shapes import shaped


class NoiseSchedule:
    """Tables of `num_train_timesteps` float32 numbers: `betas`, `alphas` and `alphas_cumprod` (a_t). Base of both schedulers."""

    CONFIG: type[NoiseScheduleConfig] = NoiseScheduleConfig

    def __init__(self, config: NoiseScheduleConfig | None = None):
        self.config = config or self.CONFIG()
        self.betas = make_betas(self.config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1)

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """From an upstream `scheduler_config.json`, already parsed. Raises ValueError for a field that we cannot honour."""
        return cls(cls.CONFIG.from_dict(values))

    @shaped
    def add_noise(
        self,
        original_samples: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, "#batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The forward process, at one timestep for all or one for each of the batch: sqrt(a_t) x_0 + sqrt(1 - a_t) n.

        In half precision the table is rounded before the roots are taken, as upstream. Raises ValueError for a timestep outside it.
        """
        signal, spread = self._weights(timesteps, like=original_samples)
        return signal * original_samples + spread * noise

    @shaped
    def get_velocity(
        self,
        sample: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, "#batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """What a network with v prediction learns: sqrt(a_t) n - sqrt(1 - a_t) x_0. Not FLUX's velocity, which is n - x_0."""
        signal, spread = self._weights(timesteps, like=sample)
        return signal * noise - spread * sample

    def _weights(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), shaped so that they multiply a batch like `like`."""
        self._check_range(timesteps)
        kept = self.alphas_cumprod.to(device=like.device, dtype=like.dtype)[timesteps.to(like.device)]
        kept = kept.reshape(len(timesteps), *[1] * (like.ndim - 1))
        return kept**0.5, (1 - kept) ** 0.5

    @shaped
    def predict_original_sample(
        self,
        model_output: Float[Tensor, "batch channels height width"],
        timestep: int | Int[Tensor, ""],
        sample: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The picture x_0 that the network sees in x_t (`sample`): Ho et al. 2020, equation 15, or its form for v."""
        self._check_range(torch.as_tensor(timestep))
        kept = self.alphas_cumprod[int(timestep)]
        if self.config.prediction_type == "epsilon":
            return (sample - (1 - kept) ** 0.5 * model_output) / kept**0.5
        if self.config.prediction_type == "v_prediction":
            return kept**0.5 * sample - (1 - kept) ** 0.5 * model_output
        return model_output

    def _check_range(self, timesteps: Tensor) -> None:
        last = self.config.num_train_timesteps - 1
        # A negative index would silently count from the end of the tables.
        if timesteps.min() < 0 or timesteps.max() > last:
            raise ValueError(f"timesteps must lie in 0 ... {last}, got {int(timesteps.min())} ... {int(timesteps.max())}")

    def _check_scheduled(self, timestep: int | Tensor) -> int:
        """The timestep as a Python integer. Raises ValueError if the schedule does not visit it."""
        if not (self.timesteps == timestep).any():
            raise ValueError(
                f"timestep {int(timestep)} is not in the schedule of {len(self.timesteps)} steps: pass one of `scheduler.timesteps`"
            )
        return int(timestep)


def make_betas(config: NoiseScheduleConfig) -> Tensor:
    """The variance that each timestep adds: evenly spaced, or, with "scaled_linear", their roots are."""
    steps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float32)
    return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=torch.float32) ** 2


def spaced_timesteps(config: NoiseScheduleConfig, num_inference_steps: int) -> np.ndarray:
    """The timesteps that are visited, in ascending order, int64: Lin et al. 2023, arXiv 2305.08891, table 2.

    "leading" counts up from `steps_offset` and so leaves out the noisiest timesteps; "trailing" counts down from the last;
    "linspace" has both ends. Raises ValueError for too few or too many steps, and when the offset leads beyond the tables.
    """
    total = config.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"num_inference_steps must be between 1 and num_train_timesteps={total}, got {num_inference_steps}")
    if config.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, num_inference_steps).round().astype(np.int64)
    if config.timestep_spacing == "trailing":
        return np.round(np.arange(total, 0, -total / num_inference_steps))[::-1].astype(np.int64) - 1
    timesteps = np.arange(num_inference_steps) * (total // num_inference_steps) + config.steps_offset
    if timesteps[-1] >= total:
        raise ValueError(
            f"steps_offset={config.steps_offset} leads {num_inference_steps} steps to timestep {timesteps[-1]}, "
            f"expected at most {total - 1}"
        )
    return timesteps
