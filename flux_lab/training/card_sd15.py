"""What the SD 1.5 example can do, measured on scenes that it never saw, and its model card.

`training.export_sd15` writes the card beside the weights. The same held-out scenes go through this autoencoder and FLUX's, so that the
two can be compared.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from flux_lab import shapes
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.files import write_text
from flux_lab.sd15.pipeline import StableDiffusionPipeline
from flux_lab.training.captions import Caption
from flux_lab.training.card import Stage, count_parameters, duration, encoded_scenes, read_json, read_run, scene_commands
from flux_lab.training.evaluate import hardware, sample_captions, sample_scenes, tally
from flux_lab.training.obedience import score
from flux_lab.training.quality import reconstruct, vae_quality
from flux_lab.training.reader import Reader, read_attributes
from flux_lab.training.report import percent, table
from flux_lab.training.scenes import render
from flux_lab.training.world import Scene

TIMESTEPS = (50, 200, 400, 600, 800, 950)
BATCH = 25
STAGES = (
    Stage("clip", "CLIP text encoder, captions with pictures (shared with flux-mini)", "clip"),
    Stage("vae", "autoencoder with 4 channels, 64-pixel crops", "vae --generation sd15"),
    Stage("unet", "UNet, predicted noise", "unet"),
)
OPTIONS = "python -m flux_lab.training.{command} --out {folder} --steps {steps} --batch {batch_size} --rate {learning_rate:g}"
MORE = {"vae": " --encode {encoded}", "unet": " --decay {decay:g} --ema {ema:g}"}

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

Stable Diffusion 1.5's anatomy at about 1/16 of its width: a UNet of four levels with cross attention, an autoencoder with {channels} latent
channels and quant convolutions, CLIP's token vectors, SD 1.5's noise schedule and PNDM. It draws one or two solids on a table top,
{size} pixels square, and is what lesson 12 of the course compares FLUX with.

```python
from flux_lab.sd15.pipeline import load_sd15
image = load_sd15("{path}")("a shiny red sphere to the left of a blue cube on grass").images[0]

from diffusers import StableDiffusionPipeline  # the same folder
pipe = StableDiffusionPipeline.from_pretrained("{path}", safety_checker=None)
image = pipe("a shiny red sphere to the left of a blue cube on grass").images[0]
```

{parameters}

There is no safety checker: it can draw nothing but solids.

## Training

Trained on the scenes of flux-mini's training, with their captions; one caption in ten was left empty, for guidance. The text encoder and
its tokenizer are flux-mini's CLIP.

{stages}

The time is the wall clock's on {hardware}, with whatever else the machine did. A loss is that of the stage's own task, at the first step
and averaged over the last 100. The autoencoder's `scaling_factor`, {scaling_factor}, is one over the measured standard deviation of its
latents, as SD 1.5's 0.18215 was.

## Measured

{measured}

## Making it again

From nothing, in the repository; every command goes on where it was stopped:

```
{commands}
```

## Limits

- It knows the words of its captions and their synonyms. Anything else gives *some* table top.
- CLIP was trained to tell captions apart as a whole; which colour belongs to which object is hard to read from its vectors.
- One or two objects, one camera, one sun, {size} pixels.
- It is made to be looked into and compared, not to be used.
"""


# ---- measuring ------------------------------------------------------------------------------------------------------------


def reconstruction(vaes: Mapping[str, AutoencoderKL], scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Name -> what `vae_quality` finds, for every autoencoder on the same pictures."""
    results = {}
    for name, vae in vaes.items():
        images = render(scenes, vae.config.sample_size)
        decoded, latents = reconstruct(vae, images)
        results[name] = vae_quality(images, decoded, latents, scenes) | {"channels": vae.config.latent_channels}
    return results


@torch.no_grad()
def noise_errors(pipe: StableDiffusionPipeline, captions: Sequence[Caption], scenes: Sequence[Scene]) -> dict[int, float]:
    """Mean squared error of the predicted noise at some timesteps; 1 is that of predicting nothing."""
    _, latents = reconstruct(pipe.vae, render(scenes, pipe.vae.config.sample_size))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    errors = {}
    with shapes.checks(enabled=False):
        text = pipe.encode_prompt([caption.text for caption in captions])
        for timestep in map(torch.tensor, TIMESTEPS):
            sample = pipe.scheduler.add_noise(latents, noise, timestep[None])
            errors[int(timestep)] = (pipe.unet(sample, timestep, text) - noise).square().mean().item()
    return errors


def draw_all(pipe: StableDiffusionPipeline, prompts: Sequence[str], **arguments: Any) -> UInt8[np.ndarray, "prompts height width 3"]:
    """One picture a prompt, in batches; picture i starts from the noise of seed i."""
    images = []
    with shapes.checks(enabled=False):
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            generators = [torch.Generator().manual_seed(start + index) for index in range(len(part))]
            images += pipe(list(part), generator=generators, **arguments).images
    return np.stack([np.asarray(image) for image in images])


def measure(
    pipe: StableDiffusionPipeline, flux: AutoencoderKL | None, reader: Reader | None, *, scenes: int, prompts: int, steps: int
) -> dict[str, Any]:
    """Everything that the card says about quality. Without `reader` nothing is drawn and read."""
    unseen = sample_scenes(scenes)
    vaes = {"this one": pipe.vae} | ({"flux-mini's": flux} if flux else {})
    report = {
        "reconstruction": reconstruction(vaes, unseen),
        "noise": noise_errors(pipe, sample_captions(unseen), unseen),
        "settings": {"scenes": scenes, "prompts": prompts, "steps": steps},
    }
    if reader and prompts:
        stated = sample_captions(sample_scenes(prompts, seed=1), seed=1)
        images = draw_all(pipe, [caption.text for caption in stated], num_inference_steps=steps)
        read = read_attributes(reader, images)
        scores = [score(caption.stated, shown) for caption, shown in zip(stated, read, strict=True)]
        report["obedience"] = {name: found.to_dict() for name, found in tally(scores).items()}
    return report


# ---- the card ---------------------------------------------------------------------------------------------------------------


def reconstruction_section(report: dict[str, Any]) -> str:
    rows = [
        (name, str(each["channels"]), f"{each['psnr']:.2f} dB", f"{each['psnr_inside_objects']:.2f} dB", f"{each['ssim']:.4f}")
        for name, each in report["reconstruction"].items()
    ]
    header = ("autoencoder", "channels", "PSNR", "PSNR inside the objects", "SSIM")
    return f"{report['settings']['scenes']} held-out scenes, encoded and decoded:\n\n" + table(header, rows)


def noise_section(report: dict[str, Any]) -> str:
    rows = [(str(timestep), f"{error:.4f}") for timestep, error in report["noise"].items()]
    return "Mean squared error of the predicted noise in them (1: nothing predicted):\n\n" + table(("timestep", "error"), rows)


def obedience_section(report: dict[str, Any]) -> str:
    if "obedience" not in report:
        return ""
    settings = report["settings"]
    rows = [
        (name, str(each["right"]), str(each["count"]), percent(each["share"]), f"{percent(each['low'])} to {percent(each['high'])}")
        for name, each in report["obedience"].items()
    ]
    words = (
        f"{settings['prompts']} prompts of held-out combinations, PNDM with {settings['steps']} steps, guidance 7.5, read by the attribute"
    )
    return f"{words}\nreader of flux-mini's card:\n\n" + table(("attribute", "right", "of", "share", "95 % interval"), rows)


def stages(folders: Mapping[str, Path]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The table of what was trained and the commands for it; stages without a log are left out."""
    rows, commands = [], []
    for stage in STAGES:
        run = read_run(folders[stage.folder])
        if run is None:
            continue
        counts = (f"{run.steps:,}", str(run.settings["batch_size"]), f"{run.samples:,}", duration(run.seconds))
        rows.append((stage.title, *counts, f"{run.first_loss:.3g} to {run.last_loss:.3g}"))
        words = run.settings | {"steps": run.steps, "command": stage.options, "folder": folders[stage.folder]}
        words["encoded"] = encoded_scenes(folders[stage.folder])
        commands.append((OPTIONS + MORE.get(stage.folder, "")).format(**words))
    return rows, commands


def write_card(
    path: Path, model: Path, report: dict[str, Any], folders: Mapping[str, Path], export_command: str, trained_on: str | None = None
) -> None:
    """Write the card of the checkpoint `model`. `folders`: where the stages clip, vae and unet left their logs."""
    vae = read_json(model / "vae" / "config.json")
    rows, commands = stages(folders)
    parameters = [(name, f"{count:,}") for name, count in count_parameters(model).items()]
    sections = (reconstruction_section(report), noise_section(report), obedience_section(report))
    text = CARD.format(
        name=model.name,
        path=model.name if model.is_absolute() else model,
        channels=vae["latent_channels"],
        size=vae["sample_size"],
        scaling_factor=vae["scaling_factor"],
        parameters=table(("part", "parameters"), parameters),
        stages=table(("stage", "steps", "batch", "samples seen", "time", "loss"), rows),
        hardware=trained_on or hardware(torch.device("cpu")),
        measured="\n\n".join(section for section in sections if section),
        commands="\n".join([*scene_commands(folders["clip"].parent), *commands, export_command]),
    )
    write_text(path, text)
