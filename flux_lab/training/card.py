"""The model card: what the miniature is, what it was trained on and for how long, its numbers, how to make it again, its limits.

python -m flux_lab.training.card --model data/flux-mini --evaluation runs/evaluation --runs runs --out data/flux-mini/README.md
"""

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from flux_lab.files import replacing, write_text
from flux_lab.training.loop import CHECKPOINT, KEPT
from flux_lab.training.report import curve_table, percent, scale_table, table, to_markdown
from flux_lab.training.world import COLORS, FLOORS, HELD_OUT, MATERIALS, SHAPES, SIZES

# Figures that stand beside the card, and what they show.
FIGURES = {
    "samples.png": "pictures of prompts it has never seen; below each, what is not right",
    "blocks.png": "how much the velocity changes when a block is taken out",
    "curve.png": "share of stated attributes that are right, against samples seen in training",
}
LAST = 100  # steps over which the final loss is averaged


class Run(NamedTuple):
    """One training run: the settings it was begun with and what its log says."""

    settings: dict[str, Any]
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    layout: bool  # whether the loss had the question of layout.py beside it; the losses here are without it

    @property
    def samples(self) -> int:
        return self.steps * self.settings["batch_size"]


def read_run(folder: Path) -> Run | None:
    """What a training stage left in its folder; None where it was not run."""
    if not (folder / "log.jsonl").exists() or not (folder / CHECKPOINT).exists():
        return None
    with safe_open(folder / CHECKPOINT, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if not lines:
        return None
    layout = "layout_loss" in lines[-1]
    losses = [line["flow_loss" if layout else "loss"] for line in lines]
    last = losses[-LAST:]
    return Run(settings, len(lines), total_seconds([line["seconds"] for line in lines]), losses[0], sum(last) / len(last), layout)


def total_seconds(clock: list[float]) -> float:
    """The time of all parts of a run: its clock starts again at zero whenever the run goes on."""
    ends = [before for before, after in itertools.pairwise(clock) if after < before]
    return sum(ends) + clock[-1]


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


class Stage(NamedTuple):
    """A folder of `runs/`, what is learned there, and the options of its command; `{...}` are filled in from the run."""

    folder: str
    title: str
    options: str


def flow_options(run: str) -> str:
    rates = "--rate {learning_rate:g} --muon {muon:g} --decay {decay:g} --ema {ema:g}"
    return f"--out runs/{run} --steps {{steps}} --batch {{batch_size}} {rates}"


STAGES = (
    Stage("reader", "attribute reader (not part of the checkpoint)", "reader --steps {steps} --batch-size {batch_size}"),
    Stage("vae", "autoencoder, 64-pixel crops", "vae --steps {steps} --batch {batch_size} --rate {learning_rate:g} --encode {encoded}"),
    Stage("t5", "T5 encoder, captions", "t5 --steps {steps} --batch {batch_size} --rate {learning_rate:g}"),
    Stage("clip", "CLIP text encoder, captions with pictures", "clip --steps {steps} --batch {batch_size} --rate {learning_rate:g}"),
    Stage("flow", "rectified flow, {blocks}", f"flow {flow_options('flow')} --layers {{layers}}{{layout}}"),
    Stage("flow2", "rectified flow, continued", f"flow {flow_options('flow2')} --initial runs/flow/transformer{{layout}}{{keep}}"),
    Stage("flow3", "rectified flow, continued further", f"flow {flow_options('flow3')} --initial runs/flow2/transformer{{layout}}{{keep}}"),
    Stage(
        "distilled",
        "guidance distillation, {blocks}",
        f"guidance {flow_options('distilled')} --initial runs/{{before}}/transformer --teacher runs/{{teacher}}/transformer",
    ),
    Stage("grown", "", "grow --initial runs/{before}/transformer --out runs/grown --layers {layers}"),
    Stage(
        "deepened",
        "guidance distillation, {blocks}",
        f"guidance {flow_options('deepened')} --initial runs/grown/transformer --teacher runs/{{teacher}}/transformer",
    ),
    Stage(
        "schnell",
        "step distillation, {blocks}",
        f"schnell {flow_options('schnell')} --initial runs/{{before}}/transformer --teacher runs/{{teacher}}/transformer",
    ),
)


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def stage_rows(runs: Path, few_steps: bool) -> tuple[list[tuple[str, ...]], list[str]]:
    """The table of what was trained, and the commands that do it again; stages that were not run are in neither.

    `few_steps`: of schnell, whose last stage dev does not have.
    """
    rows, commands, before, teacher = [], [], "", ""
    out = " --out data/flux-mini-schnell --share data/flux-mini" if few_steps else ""
    for stage in STAGES:
        folder, config = runs / stage.folder, read_json(runs / stage.folder / "transformer" / "config.json")
        run = read_run(folder)
        if (run is None and not config) or (stage.folder == "schnell" and not few_steps):
            continue
        layers = (config.get("num_layers", 0), config.get("num_single_layers", 0))
        words = {
            "before": before,
            "layout": "",
            "keep": kept_option(folder),
            "teacher": teacher,
            "encoded": encoded_scenes(folder),
            "blocks": "{} + {} blocks".format(*layers),
            "layers": "{} {}".format(*layers),
        }
        if run:
            words |= {"muon": 0.0} | run.settings | {"steps": run.steps, "layout": "" if run.layout else " --layout 0"}
            loss = f"{run.first_loss:.3g} to {run.last_loss:.3g}"
            counts = (f"{run.steps:,}", str(run.settings["batch_size"]), f"{run.samples:,}", duration(run.seconds))
            rows.append((stage.title.format(**words), *counts, loss))
        commands.append("python -m flux_lab.training." + stage.options.format(**words))
        before = stage.folder if config else before
        teacher = stage.folder if stage.folder.startswith("flow") else teacher
    return rows, [*commands, f"python -m flux_lab.training.export --transformer runs/{before}/transformer{out}"]


def kept_option(folder: Path) -> str:
    """The option that kept checkpoints of a run for its learning curve."""
    steps = sorted(int(file.stem) for file in (folder / KEPT).glob("*.safetensors"))
    return f" --keep {steps[0]}" if steps else ""


def curve_command(runs: Path) -> list[str]:
    curve = read_json(runs / "curve" / "curve.json")
    folders = [stage.folder for stage in STAGES if stage.folder.startswith("flow")]
    flows = " ".join(f"runs/{folder}" for folder in folders if (runs / folder / CHECKPOINT).exists())
    options = "--prompts {prompts} --steps {steps} --true-cfg {true_cfg:g}"
    return [f"python -m flux_lab.training.curve --runs {flows} {options.format(**curve['settings'])}"] if curve else []


def encoded_scenes(folder: Path) -> int:
    """How many scenes have latents in this folder."""
    file = folder / "latents.safetensors"
    if not file.exists():
        return 0
    with safe_open(file, "pt") as handle:
        return handle.get_slice("latents").get_shape()[0]


def scene_commands(runs: Path) -> list[str]:
    """The commands that render the pictures and train the vocabularies."""
    commands = []
    for folder, option in (("scenes", ""), ("scenes_eval", " --held-out")):
        settings = read_json(runs / folder / "settings.json") or {"count": 32000 if not option else 1000, "seed": int(bool(option))}
        commands.append(
            f"python -m flux_lab.training.scenes --count {settings['count']} --seed {settings['seed']} --out runs/{folder}{option}"
        )
    return [*commands, "python -m flux_lab.training.tokenizers"]


def count_parameters(model: Path) -> dict[str, int]:
    """The parameters of each part of a checkpoint, from the headers of its files."""
    counts = {}
    for file in sorted(model.glob("*/*.safetensors")):
        with safe_open(file, "pt") as handle:
            shapes = [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118
        counts[file.parent.name] = sum(map(math.prod, shapes))
    return counts


def everything(point: dict[str, Any]) -> str:
    return percent(point["obedience"]["all"]["share"])


def curve_section(runs: Path) -> str:
    """What more training buys, where it was measured (`curve.py`)."""
    curve = read_json(runs / "curve" / "curve.json")
    if not curve:
        return ""
    each, points = curve["settings"], curve["points"]
    last = points[-1]
    half = max(
        (point for point in points if 2 * point["samples"] <= last["samples"]), key=lambda point: point["samples"], default=points[0]
    )
    return f"""
## Quality against samples seen

The rectified flow before guidance distillation: {each["prompts"]} held-out prompts, {each["steps"]} steps, true CFG {each["true_cfg"]:g}
(`python -m flux_lab.training.curve`). *Layout asked*: beside the velocity, training asked what stands where (`layout.py`). The learning
rate falls towards the end of each run, which by itself raises its last points.

{curve_table(curve)}

From {half["samples"]:,} to {last["samples"]:,} samples, the share with everything right went from {everything(half)}
to {everything(last)}: by this it can be judged what more compute would buy.

What true classifier-free guidance does for the last of them, which is not distilled; 1 is none:

{scale_table(curve)}
"""


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

{kind}'s anatomy at about 1/32 of its width: {blocks} blocks of width {width}, a 16-channel autoencoder that halves a picture three
times, CLIP's pooled vector and T5's token vectors, {guided}. It draws one or two solids on a table
top, {size} pixels square.{links}

```python
prompt = "a shiny red sphere to the left of a blue cube on grass"

from flux_lab import FluxPipeline
image = FluxPipeline.from_pretrained("{path}")(prompt{call}).images[0]

from diffusers import FluxPipeline  # the same folder; diffusers knows neither size by itself
pipe = FluxPipeline.from_pretrained("{path}")
image = pipe(prompt, height={size}, width={size}, max_sequence_length={length}{call}).images[0]
```

{parameters}

## Training

Trained on {scenes} pictures of {size} x {size} pixels that our own ray tracer made: one or two objects of {shapes}; {colors}; {sizes};
{materials}; on a {floors} floor; two objects stand to the left or right, in front of or behind one another. Each picture has {captions}
captions in many wordings. One in {held_out} of all combinations (colours, shapes, relation) never occurs in training.

{stages}

Computed on {hardware}. The time is the wall clock's, with whatever else the machine did. A loss is that of the stage's own task, at the
first step and averaged over the last {last}.

{measured}{curve}{figures}
## Making it again

From nothing, in the repository; every command goes on where it was stopped:

```
{commands}
```

## Limits

- It knows the words of its captions and their synonyms. Anything else gives *some* table top.
- One or two objects, one camera, one sun, {size} pixels. Other sizes run, but are not what it was trained on.
- Straight edges come out wavy, and a small cube can look like a cup.
- Of what prompts state, it gets the {weakest} right least often: {weakest_share} of the time.
- It is made to be looked into, not to be used: all its pictures are of solids that its own ray tracer draws better.
"""


def copy_figures(folders: Sequence[Path], out: Path) -> str:
    """Put the figures that there are beside the card, and say so in Markdown."""
    lines = []
    for name, shows in FIGURES.items():
        for file in [folder / name for folder in folders if (folder / name).exists()]:
            with replacing(out / name) as copied:
                shutil.copyfile(file, copied)
            lines.append(f"\n![{shows}]({name})\n")
    return "".join(lines)


def write_card(path: Path, model: Path, evaluation: Path, runs: Path, trained_on: str | None = None) -> None:
    """Write the card of the checkpoint `model` from the folder of its evaluation and the logs of `runs`; `trained_on`: the machine."""
    report = read_json(evaluation / "report.json")
    transformer, vae, tokenizer_2 = (
        read_json(model / name) for name in ("transformer/config.json", "vae/config.json", "tokenizer_2/tokenizer_config.json")
    )
    few_steps = not transformer["guidance_embeds"]
    rows, commands = stage_rows(runs, few_steps)
    scenes = read_json(runs / "scenes" / "settings.json")
    settings = report["settings"]
    evaluate = f"python -m flux_lab.training.evaluate --prompts {settings['prompts']} --steps {settings['steps']}"
    evaluate += f" --guidance {settings['guidance']:g}"
    if "behaviour" in report:
        evaluate += f" --behaviour {report['behaviour']['prompts']}"
    evaluate += " --model data/flux-mini-schnell" if few_steps else ""
    evaluate += f" --card {path.name if path.is_absolute() else path}"
    obedience = report["obedience"]
    weakest = min((name for name in obedience if name != "all"), key=lambda name: obedience[name]["share"])
    parameters = [(name, f"{count:,}") for name, count in count_parameters(model).items()]
    text = CARD.format(
        name=model.name,
        kind="FLUX.1-schnell" if few_steps else "FLUX.1-dev",
        guided="no guidance embedding: it draws in four steps" if few_steps else "a guidance embedding",
        call=", num_inference_steps=4, guidance_scale=0.0" if few_steps else "",
        links=" All parts but the transformer and the scheduler are links to `flux-mini`'s." if few_steps else "",
        path=model.name if model.is_absolute() else model,
        blocks=f"{transformer['num_layers']} + {transformer['num_single_layers']}",
        width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
        size=vae["sample_size"],
        length=tokenizer_2["model_max_length"],
        parameters=table(("part", "parameters"), parameters),
        scenes=f"{scenes.get('count', 0):,}",
        captions=scenes.get("captions", 0),
        shapes=", ".join(SHAPES),
        colors=", ".join(COLORS),
        sizes=" or ".join(SIZES),
        materials=" or ".join(MATERIALS),
        floors=", ".join(FLOORS),
        held_out=HELD_OUT,
        stages=table(("stage", "steps", "batch", "samples seen", "time", "loss"), rows),
        hardware=trained_on or settings["hardware"],
        last=LAST,
        measured=to_markdown(report),
        curve=curve_section(runs),
        figures=copy_figures([evaluation, runs / "curve"], path.parent),
        weakest=weakest,
        weakest_share=percent(obedience[weakest]["share"]),
        commands="\n".join([*scene_commands(runs), *commands, *curve_command(runs), evaluate]),
    )
    write_text(path, text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux_lab.training.card", description="Write the model card.")
    parser.add_argument("--model", type=Path, default=Path("data/flux-mini"), help="the checkpoint folder")
    parser.add_argument("--evaluation", type=Path, default=Path("runs/evaluation"), help="the folder that evaluate wrote")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the training runs")
    parser.add_argument("--out", type=Path, default=Path("data/flux-mini/README.md"), help="file to write")
    parser.add_argument("--trained-on", help="the machine, in words; default: the one of the evaluation")
    options = parser.parse_args(arguments)
    if not (options.evaluation / "report.json").exists():
        parser.error(f"--evaluation {options.evaluation}: no report.json in it; run python -m flux_lab.training.evaluate first")
    write_card(options.out, options.model, options.evaluation, options.runs, options.trained_on)


if __name__ == "__main__":
    main()
