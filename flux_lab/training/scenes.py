"""Stage 1: render scenes with their captions to a folder.

    python -m flux_lab.training.scenes --count 32000 --seed 0 --out runs/scenes --workers 2
    python -m flux_lab.training.scenes --count 1000 --seed 1 --out runs/scenes_eval --held-out

`images.npy` (uint8 `[scenes, 128, 128, 3]`, may be memory-mapped) and `scenes.jsonl` (one line a picture: the scene, whether its
combination is held out, its standard wording and its captions). Work is done in shards, each with its own random generator, so a run
that was killed goes on where it was and gives the same files with any number of workers.
"""

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flux_lab.files import replacing, write_text
from flux_lab.training.captions import Caption, Stated, captions, standard
from flux_lab.training.raytrace import render
from flux_lab.training.world import (
    COLORS,
    FLOORS,
    INVERSE,
    MATERIALS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    combination,
    held_out,
    sample_scene,
)

__all__ = [
    "COLORS",
    "FLOORS",
    "INVERSE",
    "MATERIALS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "SceneObject",
    "combination",
    "held_out",
    "read_captions",
    "read_images",
    "read_scenes",
    "render",
    "sample_scene",
    "write_scenes",
]


@dataclass(frozen=True)
class Settings:
    """What a folder of scenes is made from. `which` is "train" (no held-out combination), "held-out" (only such) or "fresh" (any);
    `shard` scenes are drawn from one random generator."""

    count: int
    seed: int = 0
    which: str = "train"
    size: int = 128
    captions: int = 8
    shard: int = 250

    def shard_slice(self, index: int) -> slice:
        return slice(index * self.shard, min((index + 1) * self.shard, self.count))


def wanted(scene: Scene, which: str) -> bool:
    return {"train": not held_out(scene), "held-out": held_out(scene), "fresh": True}[which]


def draw(settings: Settings, rng: np.random.Generator) -> Scene:
    while True:
        scene = sample_scene(rng)
        if wanted(scene, settings.which):
            return scene


def describe(scene: Scene, settings: Settings, rng: np.random.Generator) -> str:
    """The line of one scene in scenes.jsonl."""
    texts = [{"text": each.text, "stated": each.stated.to_dict()} for each in captions(scene, rng, settings.captions)]
    return json.dumps(scene.to_dict() | {"held_out": held_out(scene), "standard": standard(scene), "captions": texts})


def make_shard(job: tuple[Path, Settings, int]) -> int:
    """Render one shard into the common array, then put its captions down as the sign that it is complete; returns its number of scenes."""
    out, settings, index = job
    rows = settings.shard_slice(index)
    rng = np.random.default_rng([settings.seed, index])
    scenes = [draw(settings, rng) for _ in range(rows.start, rows.stop)]
    lines = [describe(scene, settings, rng) for scene in scenes]
    images = np.lib.format.open_memmap(out / "shards" / "images.npy", mode="r+")
    images[rows] = render(scenes, settings.size)
    images.flush()
    write_text(out / "shards" / f"{index:05d}.jsonl", "".join(line + "\n" for line in lines))
    return len(scenes)


def prepare(out: Path, settings: Settings) -> None:
    """Make the folder and the empty array; raises ValueError when the folder was begun with other settings."""
    shards, record = out / "shards", out / "settings.json"
    shards.mkdir(parents=True, exist_ok=True)
    if record.exists() and json.loads(record.read_text()) != asdict(settings):
        raise ValueError(f"--out {out}: expected the settings it was begun with, {record.read_text().strip()}, got {asdict(settings)}")
    write_text(record, json.dumps(asdict(settings)) + "\n")
    if not (shards / "images.npy").exists():
        shape = (settings.count, settings.size, settings.size, 3)
        with replacing(shards / "images.npy") as file:
            np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape).flush()


def make_shards(jobs: list, workers: int) -> Iterator[int]:
    if workers == 1:
        yield from map(make_shard, jobs)
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            yield from pool.imap_unordered(make_shard, jobs)


def write_scenes(out: Path, settings: Settings, workers: int = 1) -> None:
    """Render `settings.count` scenes into `out`, or what is still missing of them.

    Raises ValueError when the folder was begun with other settings.
    """
    out = Path(out)
    prepare(out, settings)
    if not (out / "images.npy").exists():
        records = [out / "shards" / f"{index:05d}.jsonl" for index in range(-(-settings.count // settings.shard))]
        jobs = [(out, settings, index) for index, record in enumerate(records) if not record.exists()]
        done = settings.count - sum(len(range(settings.count)[settings.shard_slice(index)]) for _, _, index in jobs)
        with tqdm(total=settings.count, initial=done, unit="scene") as progress:
            for made in make_shards(jobs, workers):
                progress.update(made)
        write_text(out / "scenes.jsonl", "".join(record.read_text() for record in records))
        os.replace(out / "shards" / "images.npy", out / "images.npy")
    shutil.rmtree(out / "shards")


def read_images(folder: Path) -> np.ndarray:
    """The pictures of a folder, uint8 `[scenes, size, size, 3]`, memory-mapped."""
    return np.load(Path(folder) / "images.npy", mmap_mode="r")


def read_lines(folder: Path) -> Iterator[dict]:
    with open(Path(folder) / "scenes.jsonl") as lines:
        yield from map(json.loads, lines)


def read_scenes(folder: Path) -> list[Scene]:
    return [Scene.from_dict(line) for line in read_lines(folder)]


def read_captions(folder: Path) -> list[list[Caption]]:
    """The captions of each scene."""
    return [[Caption(each["text"], Stated.from_dict(each["stated"])) for each in line["captions"]] for line in read_lines(folder)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux_lab.training.scenes", description="Render scenes with captions.")
    parser.add_argument("--count", type=int, default=32000, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="folder to write, or to go on with")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--captions", type=int, default=8, help="captions a scene")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--held-out", dest="which", action="store_const", const="held-out", help="only combinations kept from training")
    which.add_argument("--fresh", dest="which", action="store_const", const="fresh", help="any combination")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.workers < 1:
        parser.error(f"--count and --workers must be at least 1, got {options.count} and {options.workers}")
    settings = Settings(count=options.count, seed=options.seed, which=options.which or "train", captions=options.captions)
    try:
        write_scenes(options.out, settings, workers=options.workers)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
