"""Train the attribute reader, which measures obedience to a prompt.

    python -m flux_lab.training.reader --scenes runs/scenes --out runs/reader --steps 1800

Writes `reader.safetensors`, `log.jsonl` and `accuracy.json`, the reader's own accuracy on scenes whose combinations it never saw.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux_lab.files import write_json
from flux_lab.training.captions import everything
from flux_lab.training.loop import Settings, train
from flux_lab.training.obedience import score
from flux_lab.training.reader_model import CELLS, VALUES, Reader, load_reader, read_attributes, save_reader, to_float
from flux_lab.training.scenes import read_images, read_scenes
from flux_lab.training.world import FLOORS, Scene, project

__all__ = ["Reader", "Task", "accuracy", "batches", "load_reader", "read_attributes", "save_reader", "score", "truth"]


class Truth(NamedTuple):
    """What the reader should say about scenes; missing second objects have `middle` far outside. Axes: [scenes, objects, ...]."""

    middle: Tensor
    position: Tensor
    labels: Tensor
    floor: Tensor


def truth(scenes: Sequence[Scene]) -> Truth:
    """Targets of scenes: middles in cells, (x, y), one label for each of VALUES, floor."""
    middle = np.full((len(scenes), 2, 2), -99.0, np.float32)
    position = np.zeros((len(scenes), 2, 2), np.float32)
    labels = np.zeros((len(scenes), 2, len(VALUES)), np.int64)
    for row, scene in enumerate(scenes):
        for slot, item in enumerate(scene.objects):
            middle[row, slot] = np.array(project(item.x, item.y, item.height / 2)) * CELLS - 0.5
            position[row, slot] = item.x, item.y
            labels[row, slot] = [values.index(getattr(item, name)) for name, values in VALUES.items()]
    floor = [FLOORS.index(scene.floor) for scene in scenes]
    return Truth(*map(torch.from_numpy, (middle, position, labels)), torch.tensor(floor))


class Task(nn.Module):
    """The loss of a reader. Presence is a bump one cell wide about each middle; cells are taught an object's attributes by its height."""

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader

    def forward(self, images: Tensor, middle: Tensor, position: Tensor, labels: Tensor, floor: Tensor) -> dict[str, Tensor]:
        reading = self.reader(images)
        cells = torch.arange(CELLS, device=images.device, dtype=middle.dtype)
        across = (rearrange(middle[..., 0], "batch objects -> batch objects 1 1") - cells) ** 2
        down = (rearrange(middle[..., 1], "batch objects -> batch objects 1 1") - rearrange(cells, "rows -> rows 1")) ** 2
        bumps = torch.exp(-(across + down) / 0.9)
        presence, owner = bumps.max(dim=1)
        presence = torch.where(presence > 0.05, presence, 0.0)
        found = F.binary_cross_entropy_with_logits(reading.presence[:, 0], presence, reduction="none").sum(dim=(1, 2)).mean()
        rows = torch.arange(len(images), device=images.device)[:, None, None]
        share = presence / presence.sum()
        there = rearrange(position[rows, owner], "batch rows columns xy -> batch xy rows columns")
        place = (F.smooth_l1_loss(reading.position, there, reduction="none").sum(dim=1) * share).sum()
        results = {"floor": F.cross_entropy(reading.floor, floor), "presence": found, "position": place}
        for index, name in enumerate(VALUES):
            wrong = F.cross_entropy(getattr(reading, name), labels[..., index][rows, owner], reduction="none")
            results[name] = (wrong * share).sum()
        return {"loss": sum(results.values()), **results}


def blur(images: Tensor, radius: float) -> Tensor:
    steps = torch.arange(-3, 4, dtype=images.dtype)
    kernel = torch.exp(-((steps / radius) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def worsen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Three quarters of the pictures softer, noisier and a little off in light and colour, as decoded latents are."""
    quarter = len(images) // 4
    worse = images[quarter:]
    chance = torch.rand(2, generator=generator)
    worse = torch.cat([blur(worse[: 2 * quarter], 0.4 + 1.2 * chance[0].item()), worse[2 * quarter :]])
    gain = 1 + 0.08 * torch.randn(len(worse), 3, 1, 1, generator=generator)
    shift = 0.04 * torch.randn(len(worse), 3, 1, 1, generator=generator)
    noise = 0.12 * chance[1] * torch.randn(worse.shape, generator=generator)
    return torch.cat([images[:quarter], worse * gain + shift + noise])


def batches(images: np.ndarray, targets: Truth, batch_size: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """The `make_batch` of training.loop for a folder of scenes."""

    def make_batch(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        pictures = to_float(torch.from_numpy(images[chosen.numpy()]))
        return {"images": worsen(pictures, generator)} | {name: value[chosen] for name, value in targets._asdict().items()}

    return make_batch


def accuracy(reader: Reader, images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of pictures read rightly, by attribute: right for both objects at once."""
    facts = [everything(scene) for scene in scenes]
    scores = [score(fact, read) for fact, read in zip(facts, read_attributes(reader, images), strict=True)]
    names = dict.fromkeys(name for each in scores for name in each)
    return {name: float(np.mean([each[name] for each in scores if name in each])) for name in names}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux_lab.training.reader", description="Train the attribute reader.")
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"), help="folder of scenes to learn from")
    parser.add_argument("--eval-scenes", type=Path, default=Path("runs/scenes_eval"), help="folder of scenes to report the accuracy on")
    parser.add_argument("--out", type=Path, default=Path("runs/reader"), help="folder to write, or to go on with")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    reader = Reader()
    settings = Settings(steps=options.steps, batch_size=options.batch_size, learning_rate=2e-3, weight_decay=1e-2, ema=0.995)
    make_batch = batches(read_images(options.scenes), truth(read_scenes(options.scenes)), options.batch_size)
    task = Task(reader)
    task.load_state_dict(train(task, make_batch, options.out, settings))
    save_reader(reader.eval(), options.out)
    report = accuracy(reader, read_images(options.eval_scenes), read_scenes(options.eval_scenes))
    write_json(options.out / "accuracy.json", report)
    for name, value in report.items():
        print(f"{name:<10} {100 * value:6.2f} %")


if __name__ == "__main__":
    main()
