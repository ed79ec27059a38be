"""Stage 8: how well a checkpoint obeys its prompts.

    python -m flux_lab.training.evaluate --model data/flux-mini --prompts 200 --steps 28 --guidance 3.5 --out runs/evaluation

The prompts are captions of scenes whose combinations never occur in training. The attribute reader says what each generated picture
shows, and only what its prompt states is scored. The same run reports what the reader and the autoencoder do on rendered scenes: a
number above the reader's own accuracy cannot be measured. With --behaviour it also takes out every block and turns the knobs (minutes).
Writes `report.json`, `report.md` and `samples.png`, with --card a model card.
"""

import argparse
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from tqdm import tqdm

from flux_lab import shapes
from flux_lab.files import write_json, write_text
from flux_lab.pipeline import FluxPipeline
from flux_lab.training import behaviour
from flux_lab.training.captions import Caption, captions, everything
from flux_lab.training.card import write_card
from flux_lab.training.obedience import score
from flux_lab.training.quality import reconstruct, vae_quality
from flux_lab.training.reader import Reader, load_reader, read_attributes
from flux_lab.training.report import Tally, draw_block_effects, draw_samples, to_markdown
from flux_lab.training.scenes import Settings, draw, render
from flux_lab.training.world import Scene

# In the order of the report. "all" is right when everything that the prompt states is.
ORDER = ("count", "color", "shape", "size", "material", "relation", "floor", "all")
BLOCK_PICTURES = 8  # on which blocks are taken out
UNSEEN = 2**20  # no shard of a folder of scenes has this number, so no scene of a folder is drawn again


class Obedience(NamedTuple):
    """Generated pictures, what each got right of what its prompt states, and the shares over all."""

    images: UInt8[np.ndarray, "prompts height width 3"]
    scores: list[dict[str, bool]]
    table: dict[str, Tally]


def sample_scenes(count: int, seed: int = 0, which: str = "held-out") -> list[Scene]:
    """Scenes that are in no folder of scenes; `which` as in scenes.Settings."""
    rng = np.random.default_rng([seed, UNSEEN])
    return [draw(Settings(count=count, which=which), rng) for _ in range(count)]


def sample_captions(scenes: Sequence[Scene], seed: int = 0) -> list[Caption]:
    """One caption a scene."""
    rng = np.random.default_rng([seed, UNSEEN + 1])
    return [captions(scene, rng, 1)[0] for scene in scenes]


def tally(scores: Sequence[dict[str, bool]]) -> dict[str, Tally]:
    """Over all pictures: how often each attribute was stated, and how often it was right."""
    complete = [each | {"all": all(each.values())} for each in scores]
    found = {name: [each[name] for each in complete if name in each] for name in ORDER}
    return {name: Tally(right=sum(rights), count=len(rights)) for name, rights in found.items() if rights}


@torch.no_grad()
def generate(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 25,
    **arguments: Any,
) -> UInt8[np.ndarray, "prompts height width 3"]:
    """One picture a prompt, in batches. Picture i starts from the noise of `seed` + i, whatever the batch size.

    `arguments` are those of `FluxPipeline.steps`, such as num_inference_steps and guidance_scale.
    """
    size = pipe.vae.config.sample_size
    total = len(prompts) * arguments.get("num_inference_steps", 28)
    images = []
    with shapes.checks(enabled=False), tqdm(total=total, desc="generating", unit="step", mininterval=2) as progress:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, min(start + batch_size, len(prompts)))
            generators = [torch.Generator().manual_seed(seed + index) for index in range(part.start, part.stop)]
            texts = [list(given[part]) if given is not None else None for given in (prompts, prompts_2)]
            for state in pipe.steps(*texts, generator=generators, **arguments):
                latents = state.latents
                progress.update(len(generators))
            images += [np.asarray(image) for image in pipe.decode(latents, size, size)]
    return np.stack(images)


def obedience_of(pipe: FluxPipeline, reader: Reader, stated: Sequence[Caption], **arguments: Any) -> Obedience:
    """Generate a picture of each caption and score what it states; `arguments` are those of `generate`."""
    images = generate(pipe, [each.text for each in stated], **arguments)
    read = read_attributes(reader, images)
    scores = [score(each.stated, shown) for each, shown in zip(stated, read, strict=True)]
    return Obedience(images, scores, tally(scores))


def reading_of(reader: Reader, images: UInt8[np.ndarray, "images height width 3"], scenes: Sequence[Scene]) -> dict[str, Tally]:
    """How often the reader is right about pictures of known scenes, all of whose attributes count."""
    return tally([score(everything(scene), read) for scene, read in zip(scenes, read_attributes(reader, images), strict=True)])


def hardware(device: torch.device) -> str:
    """What this process computes on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of an {platform.machine()} processor with {os.cpu_count()} cores"


def evaluate(pipe: FluxPipeline, reader: Reader, options: argparse.Namespace) -> tuple[dict[str, Any], list[Caption], Obedience]:
    """The report, section by section, with the captions and pictures behind it. Further measurements become further sections."""
    start = time.time()
    stated = sample_captions(sample_scenes(options.prompts, options.seed, options.which), options.seed)
    arguments = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "true_cfg_scale": options.true_cfg}
    if options.true_cfg > 1:
        arguments["negative_prompt"] = ""
    obedience = obedience_of(pipe, reader, stated, seed=options.seed, batch_size=options.batch, **arguments)
    seconds = time.time() - start
    # Other scenes than those of the prompts: nothing here depends on the transformer.
    scenes = sample_scenes(options.scenes, options.seed + 1, options.which)
    rendered = render(scenes, pipe.vae.config.sample_size)
    decoded, latents = reconstruct(pipe.vae, rendered)
    report = {
        "settings": {
            "prompts": options.prompts,
            "combinations": options.which,
            "steps": options.steps,
            "guidance": options.guidance,
            "true_cfg": options.true_cfg,
            "seed": options.seed,
            "hardware": hardware(pipe.device),
            "seconds_per_picture": seconds / options.prompts,
        },
        "obedience": as_dicts(obedience.table),
        "reader": {
            "rendered": as_dicts(reading_of(reader, rendered, scenes)),
            "reconstructed": as_dicts(reading_of(reader, decoded, scenes)),
        },
        "vae": vae_quality(rendered, decoded, latents, scenes),
    }
    if options.behaviour:
        report["behaviour"] = behaviour_of(pipe, reader, stated[: options.behaviour], options)
    return report, stated, obedience


def behaviour_of(pipe: FluxPipeline, reader: Reader, stated: Sequence[Caption], options: argparse.Namespace) -> dict[str, Any]:
    """What taking out blocks, guidance, steps and a second prompt change, on few prompts."""
    usual = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "seed": options.seed, "batch_size": options.batch}

    def draw(prompts: Sequence[str], prompts_2: Sequence[str] | None = None, **changed: Any) -> np.ndarray:
        return generate(pipe, prompts, prompts_2, **usual | changed)

    some = sample_scenes(BLOCK_PICTURES, options.seed + 2, options.which)
    latents = reconstruct(pipe.vae, render(some, pipe.vae.config.sample_size))[1].to(pipe.device)
    texts = [each.text for each in sample_captions(some, options.seed + 2)]
    return {
        "prompts": len(stated),
        "blocks": behaviour.block_effects(pipe, texts, latents, options.guidance),
        "guidance": behaviour.guidance_sweep(draw, reader, stated),
        "steps": behaviour.step_sweep(draw, reader, stated),
        "conflict": behaviour.conflict(draw, reader, stated),
    }


def as_dicts(table: dict[str, Tally]) -> dict[str, dict]:
    return {name: each.to_dict() for name, each in table.items()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flux_lab.training.evaluate", description="Measure how well a checkpoint obeys.")
    parser.add_argument("--model", type=Path, default=Path("data/flux-mini"), help="a checkpoint folder")
    parser.add_argument("--reader", type=Path, default=Path("runs/reader"), help="folder of the trained attribute reader")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder to write")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--scenes", type=int, default=300, help="rendered scenes to measure the reader and the autoencoder on")
    parser.add_argument("--combinations", dest="which", choices=("held-out", "train", "fresh"), default="held-out")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--true-cfg", type=float, default=1.0, help="above 1: a second pass with the empty prompt")
    parser.add_argument("--batch", type=int, default=25, help="pictures at once")
    parser.add_argument("--behaviour", type=int, default=0, metavar="PROMPTS", help="also take out blocks, vary guidance, steps, prompt_2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--card", type=Path, help="also write the model card to this file")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the training runs, for the model card")
    parser.add_argument("--trained-on", help="the machine that trained, in words, for the model card; default: this one")
    options = parser.parse_args(arguments)
    for name in ("prompts", "scenes", "steps", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    pipe = FluxPipeline.from_pretrained(options.model, device=options.device)
    reader = load_reader(options.reader).to(options.device)
    report, stated, obedience = evaluate(pipe, reader, options)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "report.json", report)
    write_text(options.out / "report.md", "# Evaluation\n\n" + to_markdown(report))
    draw_samples(options.out / "samples.png", obedience.images, [each.text for each in stated], obedience.scores)
    if "behaviour" in report:
        draw_block_effects(options.out / "blocks.png", report["behaviour"]["blocks"], behaviour.SIGMAS)
    print(to_markdown(report))
    if options.card:
        write_card(options.card, options.model, options.out, options.runs, options.trained_on)


if __name__ == "__main__":
    main()
