"""The training loop that all stages share: resumable at any step, logged, on one process or many.

Everything random in a step is drawn from a generator seeded with (seed, step), and the optimizer's state is in the checkpoint: a run
that was killed goes on as if it had not been. Started with torchrun, every process takes its share of the same batch:

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m flux_lab.training.flow --layers 4 8
"""

import collections
import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from flux_lab import shapes
from flux_lab.files import replacing
from flux_lab.training.optimizer import optimizers_of

CHECKPOINT = "checkpoint.safetensors"
KEPT = "kept"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one run. The rate warms up linearly, stays, and falls linearly to zero over the last `decay` of all steps; so `steps` and
    `decay` may be changed when a run is resumed before it has begun to fall. Every other field must stay."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.0
    muon: float = 0.0  # the rate of Muon for the matrices inside blocks, in multiples of the learning rate; 0: AdamW for all
    ema: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 250
    keep_every: int = 0  # a multiple of save_every: what is saved then stays, as `kept/STEP.safetensors`; 0: only the last

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), falling)


def train(
    task: nn.Module, make_batch: Callable[[int, torch.Generator], dict[str, Tensor]], out: Path, settings: Settings
) -> dict[str, Tensor]:
    """Minimise `task(**batch)["loss"]`; further entries of what the task returns are logged.

    `make_batch(step, generator)` returns the tensors of the whole batch, the same on every process; all share their first axis.
    Writes `out/checkpoint.safetensors` and `out/log.jsonl`, and returns the trained parameters (their moving average with `ema`).
    Raises ValueError when `out` holds a run with other settings.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    task = task.to(accelerator.device).train()
    parameters = dict(task.named_parameters())
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    optimizers = optimizers_of(parameters, settings.weight_decay, settings.muon)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()} if settings.ema else {}
    first = _resume(out, settings, parameters, average, optimizers)
    wrapped = accelerator.prepare(task)
    is_main = accelerator.is_main_process

    with shapes.checks(enabled=False), _log(out / "log.jsonl", first, is_main) as log:
        for step in tqdm(range(first, settings.steps), initial=first, total=settings.steps, disable=not is_main, mininterval=5):
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            batch = {
                name: tensor.chunk(accelerator.num_processes)[accelerator.process_index].to(accelerator.device)
                for name, tensor in make_batch(step, generator).items()
            }
            results = wrapped(**batch)
            task.zero_grad()
            accelerator.backward(results["loss"])
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
            for optimizer, multiple in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = settings.rate(step) * multiple
                optimizer.step()
            if average:
                # A short memory at first, so that the average forgets the random start.
                keep = min(settings.ema, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(average.values()), [parameter.detach() for parameter in parameters.values()], 1 - keep)
            results = {name: accelerator.reduce(value.detach(), "mean").item() for name, value in results.items()}
            log(step, results)
            if is_main and ((step + 1) % settings.save_every == 0 or step + 1 == settings.steps):
                _save(out, settings, step + 1, parameters, average, optimizers)
    accelerator.wait_for_everyone()  # the checkpoint is there for all
    return average or {name: parameter.detach() for name, parameter in parameters.items()}


def _save(out: Path, settings: Settings, step: int, parameters: dict, average: dict, optimizers: Iterable[Optimizer]) -> None:
    tensors = {f"model.{name}": parameter.detach().contiguous() for name, parameter in parameters.items()}
    tensors |= {f"average.{name}": tensor.contiguous() for name, tensor in average.items()}
    for name, parameter in parameters.items():
        for state in (optimizer.state[parameter] for optimizer in optimizers if parameter in optimizer.state):
            tensors |= {f"optimizer.{name}.{key}": value.contiguous() for key, value in state.items()}
    metadata = {"step": str(step), "settings": json.dumps(dataclasses.asdict(settings))}
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / CHECKPOINT) as file:
        save_file(tensors, file, metadata)
    if settings.keep_every and step % settings.keep_every == 0:
        (out / KEPT).mkdir(exist_ok=True)
        with replacing(out / KEPT / f"{step:06}.safetensors") as file:
            shutil.copyfile(out / CHECKPOINT, file)


def _resume(out: Path, settings: Settings, parameters: dict, average: dict, optimizers: Iterable[Optimizer]) -> int:
    """Load `out`'s checkpoint, if there is one, into everything; the number of steps it has behind it."""
    if not (out / CHECKPOINT).exists():
        return 0
    with safe_open(out / CHECKPOINT, "pt") as file, torch.no_grad():
        metadata = file.metadata()
        _check_settings(out, json.loads(metadata["settings"]), dataclasses.asdict(settings))
        states = collections.defaultdict(dict)
        for key in list(file.keys()):
            if key.startswith("optimizer."):
                name, _, entry = key.removeprefix("optimizer.").rpartition(".")
                states[name][entry] = file.get_tensor(key)
        holders = {parameter: optimizer for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            # In the memory layout of the parameter, which may be channels-last.
            holders[parameter].state[parameter] = {
                entry: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
                for entry, value in states[name].items()
            }
        for name in average:
            average[name].copy_(file.get_tensor(f"average.{name}"))
    return int(metadata["step"])


def _check_settings(out: Path, before: dict, now: dict) -> None:
    for name, value in before.items():
        if name not in ("steps", "decay", "save_every", "keep_every") and now[name] != value:
            raise ValueError(f"{out}: holds a run with {name}={value}, asked for {now[name]}; use another folder or remove this one")


def is_main_process() -> bool:
    """Whether this process is the one that writes files: one of all that torchrun started, or the only one."""
    from accelerate import PartialState

    return PartialState().is_main_process


def load_trained(out: Path, part: str = "", checkpoint: str = CHECKPOINT) -> dict[str, Tensor]:
    """The parameters in a checkpoint of the run in `out`: their moving average where it kept one. Raises FileNotFoundError.

    With `part`, only those of this module of the task, under the names that they have inside it.
    """
    if not (out / checkpoint).exists():
        raise FileNotFoundError(f"{out / checkpoint}: not there; run the stage that writes it first")
    with safe_open(out / checkpoint, "pt") as file:
        names = list(file.keys())
        prefix = "average." if any(name.startswith("average.") for name in names) else "model."
        prefix += f"{part}." if part else ""
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}


@contextlib.contextmanager
def _log(path: Path, first: int, is_main: bool) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yields what writes one json line a step. When a run resumes, lines after its checkpoint are dropped: those steps are done again."""
    if not is_main:
        yield lambda step, results: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines()[:first] if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines))
    start = time.time()
    with path.open("a", buffering=1) as file:

        def write(step: int, results: dict[str, float]) -> None:
            rounded = {name: round(value, 5) for name, value in results.items()}
            file.write(json.dumps({"step": step, **rounded, "seconds": round(time.time() - start, 1)}) + "\n")

        yield write
