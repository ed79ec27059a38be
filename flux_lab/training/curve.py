"""The learning curve: how well the flow obeys after so many samples.

    python -m flux_lab.training.curve --runs runs/flow runs/flow2 --prompts 150 --out runs/curve

Every checkpoint that a flow run kept (`flow --keep 1000`), and its last, draws the same prompts from the same noise, with true
classifier-free guidance: it has not learned the guidance embedding yet. A run's samples count on top of those of the runs before it.
A checkpoint that was measured already is not measured again. The last one also shows what true guidance does, at several scales.
Writes `curve.json` and `curve.png`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flux_lab.checkpoints import load_transformer
from flux_lab.files import write_json
from flux_lab.pipeline import FluxPipeline
from flux_lab.training.card import read_json, read_run
from flux_lab.training.evaluate import as_dicts, obedience_of, sample_captions, sample_scenes
from flux_lab.training.loop import CHECKPOINT, KEPT, load_trained
from flux_lab.training.reader import load_reader
from flux_lab.training.report import curve_table, scale_table, write_figure

SCALES = (1.0, 2.0, 3.5, 5.0)


def checkpoints(runs: list[Path]) -> Iterator[tuple[Path, str, int]]:
    """(run, name of a checkpoint in it, samples seen until then, those of the runs before it included), in their order."""
    before = 0
    for run in runs:
        kept = [file.relative_to(run).as_posix() for file in sorted((run / KEPT).glob("*.safetensors"))]
        seen = before
        for name in [*kept, CHECKPOINT]:
            last, seen = seen, before + samples(run / name)
            if seen > last:  # the last one may have been kept, too
                yield run, name, seen
        before = seen


def samples(checkpoint: Path) -> int:
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    return int(metadata["step"]) * json.loads(metadata["settings"])["batch_size"]


def draw_curve(path: Path, curve: dict[str, Any]) -> None:
    """Share that is right against samples seen, a line for each attribute with its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    seen = [point["samples"] / 1000 for point in curve["points"]]
    for name in curve["points"][0]["obedience"]:
        found = [point["obedience"][name] for point in curve["points"]]
        (line,) = axes.plot(seen, [100 * each["share"] for each in found], "o-", label=name, linewidth=3 if name == "all" else 1.5)
        axes.fill_between(seen, *([100 * each[end] for each in found] for end in ("low", "high")), color=line.get_color(), alpha=0.1)
    axes.set(xlabel="samples seen, thousands", ylabel="right, %", ylim=(0, 100))
    axes.legend(ncols=2, fontsize=8)
    axes.grid(alpha=0.3)
    write_figure(path, figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[Path("runs/flow")], help="flow runs, each of which continues the one before"
    )
    parser.add_argument("--model", type=Path, default=Path("data/flux-mini"), help="a checkpoint, for all parts but the transformer")
    parser.add_argument("--reader", type=Path, default=Path("runs/reader"))
    parser.add_argument("--out", type=Path, default=Path("runs/curve"))
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--true-cfg", type=float, default=3.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    pipe = FluxPipeline.from_pretrained(options.model, device=options.device)
    reader = load_reader(options.reader).to(options.device)
    stated = sample_captions(sample_scenes(options.prompts))
    curve = {"points": []} | read_json(options.out / "curve.json")
    settings = {"prompts": options.prompts, "steps": options.steps, "true_cfg": options.true_cfg}
    if curve.setdefault("settings", settings) != settings:
        parser.error(f"--out {options.out}: holds a curve measured with {curve['settings']}, asked for {settings}; use another folder")
    options.out.mkdir(parents=True, exist_ok=True)

    def measure(run: Path, name: str, scale: float) -> dict[str, Any]:
        pipe.transformer = load_transformer(run / "transformer", device=options.device)
        pipe.transformer.load_state_dict(load_trained(run, "transformer", name))
        drawing = {"num_inference_steps": options.steps, "guidance_scale": 1.0, "true_cfg_scale": scale, "negative_prompt": ""}
        return as_dicts(obedience_of(pipe, reader, stated, **drawing).table)

    for run, name, seen in checkpoints(options.runs):
        if seen in [point["samples"] for point in curve["points"]]:
            continue
        point = {"samples": seen, "layout": read_run(run).layout, "obedience": measure(run, name, options.true_cfg)}
        curve["points"] = sorted([*curve["points"], point], key=lambda each: each["samples"])
        write_json(options.out / "curve.json", curve)
        draw_curve(options.out / "curve.png", curve)
    if curve.get("scales", {}).get("samples") != seen:
        curve["scales"] = {"samples": seen, "obedience": {f"{scale:g}": measure(run, name, scale) for scale in SCALES}}
        write_json(options.out / "curve.json", curve)
    print(curve_table(curve), scale_table(curve), sep="\n\n")


if __name__ == "__main__":
    main()
