"""PNDM: sampling as an ordinary differential equation, with the slopes of earlier steps used again.

Where DDPM takes hundreds of random steps, this takes some 50 that are not random. Two solvers for the slope, one step between
(equation 9): Runge-Kutta ("prk"), four evaluations a step, and linear multistep ("plms"), one evaluation and a memory of three.
Source: Liu et al. 2022, arXiv 2202.09778, equations 9, 12 and 13, algorithm 2; diffusers `scheduling_pndm.py`.
"""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flux_lab.sd15.config import PNDMSchedulerConfig
from flux_lab.sd15.noise_schedule import NoiseSchedule, spaced_timesteps
from flux_lab.shapes import shaped

RUNGE_KUTTA_STEPS = 3
EVALUATIONS = 4


class PNDMScheduler(NoiseSchedule):
    """`set_timesteps` makes `timesteps` (`prk_timesteps`, then `plms_timesteps`): one for each evaluation of the network, so some
    stand there twice; `step` takes them in order and keeps count.
    """

    CONFIG = PNDMSchedulerConfig

    def __init__(self, config: PNDMSchedulerConfig | None = None):
        super().__init__(config)
        self.final_alpha_cumprod = torch.tensor(1.0) if self.config.set_alpha_to_one else self.alphas_cumprod[0]
        self.num_inference_steps: int | None = None
        self.prk_timesteps = self.plms_timesteps = np.array([], dtype=np.int64)
        self._forget()

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose a number of steps, spaced as the config says, and forget all slopes.

        With `skip_prk_steps` (SD 1.5) one evaluation more than steps: the second timestep comes twice. Without, the first three steps
        are Runge-Kutta's, of four evaluations each, and there must be at least four steps. Raises ValueError.
        """
        visited = spaced_timesteps(self.config, num_inference_steps)[::-1]
        if not self.config.skip_prk_steps and num_inference_steps <= RUNGE_KUTTA_STEPS:
            raise ValueError(
                f"set_timesteps: num_inference_steps={num_inference_steps}, expected at least {RUNGE_KUTTA_STEPS + 1}, "
                f"because the first {RUNGE_KUTTA_STEPS} are Runge-Kutta's; or set skip_prk_steps"
            )
        self.num_inference_steps = num_inference_steps
        if self.config.skip_prk_steps:
            prk, plms = [], np.concatenate([visited[:2], visited[1:]])
        else:
            half = self._stride // 2
            ladder = pairwise(visited[: RUNGE_KUTTA_STEPS + 1])
            prk = [timestep for high, low in ladder for timestep in (high, low + half, low + half, low)]
            plms = visited[RUNGE_KUTTA_STEPS:]
        self.prk_timesteps, self.plms_timesteps = np.array(prk, dtype=np.int64), plms.copy()
        self.timesteps = torch.from_numpy(np.concatenate([self.prk_timesteps, self.plms_timesteps])).to(device)
        self._forget()

    def _forget(self) -> None:
        self.counter = 0
        self.ets: list[Tensor] = []
        self._slopes: list[Tensor] = []
        self._start: Tensor | None = None

    @property
    def _stride(self) -> int:
        """How far one step leads."""
        return self.config.num_train_timesteps // self.num_inference_steps

    @shaped
    def step(
        self,
        model_output: Float[Tensor, "batch channels height width"],
        timestep: int | Int[Tensor, ""],
        sample: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Take the next step, Runge-Kutta's as long as there are `prk_timesteps`.

        `timestep` is one of `timesteps`, not its index. Raises ValueError; also before `set_timesteps` and after the last step.
        """
        solver = self.step_prk if self.counter < len(self.prk_timesteps) else self.step_plms
        return solver(model_output, timestep, sample)

    def _check_ready(self, timestep: int | Tensor) -> int:
        if self.num_inference_steps is None:
            raise ValueError("step: the number of steps is not known; call `set_timesteps` first")
        if self.counter >= len(self.timesteps):
            raise ValueError(f"step: the schedule of {len(self.timesteps)} evaluations is at its end; call `set_timesteps` to start again")
        return self._check_scheduled(timestep)

    def step_prk(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor:
        """One of the four evaluations of a Runge-Kutta step (equation 13), all of them from where the first stood.

        The slope is taken at the start, twice in the middle, and at the end; the fourth time the step is made with
        (k1 + 2 k2 + 2 k3 + k4) / 6.
        """
        timestep = self._check_ready(timestep)
        stage = self.counter % EVALUATIONS
        if stage == 0:
            self.ets.append(model_output)
            self._slopes, self._start = [], sample
        self._slopes.append(model_output)
        slope = model_output
        if stage == EVALUATIONS - 1:
            first, second, third, fourth = self._slopes
            slope = 1 / 6 * first + 1 / 3 * second + 1 / 3 * third + 1 / 6 * fourth
        start = int(self.prk_timesteps[self.counter - stage])
        # The first and third evaluation lead half a step down from their timestep; the second and fourth have theirs as their target.
        target = timestep - (self._stride // 2 if stage % 2 == 0 else 0)
        self.counter += 1
        return self._transfer(self._start, start, target, slope)

    def step_plms(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor:
        """One linear multistep step (equation 12): the slope from this evaluation and up to three before it.

        Without Runge-Kutta in front the first step is made twice: with the slope at its start, then, from the same start, with the
        mean of the slopes at both ends. Raises ValueError if there should be slopes of Runge-Kutta steps and are not.
        """
        timestep = self._check_ready(timestep)
        if not self.config.skip_prk_steps and len(self.ets) < RUNGE_KUTTA_STEPS:
            raise ValueError(f"step_plms: {len(self.ets)} slopes are known, expected {RUNGE_KUTTA_STEPS} from `step_prk`")
        is_repeated = self.counter == 1
        target = timestep - self._stride
        if is_repeated:
            timestep, target, sample = timestep + self._stride, timestep, self._start
            slope = (model_output + self.ets[-1]) / 2
        else:
            self.ets = [*self.ets[-3:], model_output]
            self._start = sample
            slope = multistep_slope(self.ets)
        self.counter += 1
        return self._transfer(sample, timestep, target, slope)

    def _transfer(self, sample: Tensor, timestep: int, target: int, model_output: Tensor) -> Tensor:
        """From x_t to x_target along the slope `model_output` (equation 9), which is exact if the predicted noise stays the same."""
        kept = self.alphas_cumprod[timestep]
        kept_target = self.alphas_cumprod[target] if target >= 0 else self.final_alpha_cumprod
        if self.config.prediction_type == "v_prediction":
            model_output = kept**0.5 * model_output + (1 - kept) ** 0.5 * sample
        scale = (kept_target / kept) ** 0.5
        denominator = kept * (1 - kept_target) ** 0.5 + (kept * (1 - kept) * kept_target) ** 0.5
        return scale * sample - (kept_target - kept) * model_output / denominator


def multistep_slope(slopes: list[Tensor]) -> Tensor:
    """Adams-Bashforth: the slope of the next step from the last one to four, newest last. The weights add up to one."""
    if len(slopes) == 1:
        return slopes[-1]
    if len(slopes) == 2:
        return (3 * slopes[-1] - slopes[-2]) / 2
    if len(slopes) == 3:
        return (23 * slopes[-1] - 16 * slopes[-2] + 5 * slopes[-3]) / 12
    return (1 / 24) * (55 * slopes[-1] - 59 * slopes[-2] + 37 * slopes[-3] - 9 * slopes[-4])
