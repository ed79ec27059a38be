"""What an evaluation says: shares with their intervals, tables in markdown, and a sheet of pictures."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from flux_lab.files import replacing

Z = 1.959964  # of the normal distribution, for 95 %
COLUMNS = 8
SMALLEST_EFFECT = 0.01  # of the velocity's norm: below it a block hardly matters
WRONG, RIGHT, BAR = "#b3261e", "#1b1b1b", "#9ecae9"


class Tally(NamedTuple):
    """`right` of `count`."""

    right: int
    count: int

    @property
    def share(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share (Wilson 1927): it stays inside 0 ... 1, also when all are right."""
        width = Z**2 / self.count
        middle = (self.share + width / 2) / (1 + width)
        half = Z / (1 + width) * math.sqrt(self.share * (1 - self.share) / self.count + width / (4 * self.count))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, float]:
        low, high = self.interval
        return {"right": self.right, "count": self.count, "share": self.share, "low": low, "high": high}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, its columns padded so that it reads well as it is; all but the first are numbers, to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "| " + " | ".join([cells[0].ljust(widths[0]), *rest]) + " |"

    rule = line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), rule, *map(line, rows)])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def share_of(section: dict[str, dict], name: str) -> str:
    return percent(section[name]["share"]) if name in section else "-"


def obedience_section(report: dict[str, Any]) -> str:
    """What is right, beside what the reader gets right of pictures that are right by construction."""
    reader, settings = report["reader"], report["settings"]
    header = ("attribute", "right", "of", "share", "95 % interval", "reader, rendered", "reader, reconstructed")
    rows = []
    for name, each in report["obedience"].items():
        interval = f"{percent(each['low'])} to {percent(each['high'])}"
        own = (share_of(reader["rendered"], name), share_of(reader["reconstructed"], name))
        rows.append((name, str(each["right"]), str(each["count"]), percent(each["share"]), interval, *own))
    true_cfg = f", true CFG {settings['true_cfg']:g}" if settings["true_cfg"] > 1 else ""
    return (
        f"{settings['prompts']} prompts ({settings['combinations']} combinations), {settings['steps']} steps, "
        f"guidance {settings['guidance']:g}{true_cfg}, {settings['seconds_per_picture']:.2f} s a picture on {settings['hardware']}, "
        "with whatever else it did. Only what a prompt states is scored; a pair is right when both objects are.\n\n" + table(header, rows)
    )


def vae_section(report: dict[str, Any]) -> str:
    vae = report["vae"]
    rows = [
        ("PSNR", f"{vae['psnr']:.2f} dB"),
        ("PSNR inside the objects", f"{vae['psnr_inside_objects']:.2f} dB"),
        ("SSIM", f"{vae['ssim']:.4f}"),
        ("mean of the scaled latents", f"{vae['latent_mean']:+.3f}"),
        ("their standard deviation", f"{vae['latent_std']:.3f}"),
    ]
    return f"{vae['pictures']} unseen scenes, encoded and decoded.\n\n" + table(("autoencoder", "mean"), rows)


def behaviour_section(report: dict[str, Any]) -> str:
    """The weakest blocks, then what each knob does."""
    found = report["behaviour"]
    strongest = {name: max(effects) for name, effects in found["blocks"].items()}
    idle = [name for name, effect in strongest.items() if effect < SMALLEST_EFFECT]
    weakest = sorted(strongest, key=strongest.__getitem__)[:5]
    blocks = (
        f"Taking out one block changes the velocity by at least {percent(SMALLEST_EFFECT)} of its norm at some noise level "
        f"for {len(strongest) - len(idle)} of {len(strongest)} blocks."
    )
    both = found["conflict"]
    parts = [
        blocks,
        table(("weakest blocks", "largest change"), [(name, percent(strongest[name])) for name in weakest]),
        f"Stated facts that are right, over {found['prompts']} prompts, while one knob is turned; diversity is how often two\n"
        "of four seeds differ in what the prompt leaves open: the floor, or an attribute that it states of no object.",
        table(
            ("guidance", "facts right", "diversity"),
            [
                (scale, percent(each["right"]), "" if each["diversity"] is None else percent(each["diversity"]))
                for scale, each in found["guidance"].items()
            ],
        ),
        table(("steps", "facts right"), [(steps, percent(right)) for steps, right in found["steps"].items()]),
        f"When `prompt` (CLIP) and `prompt_2` (T5) say different scenes, {percent(both['right']['prompt'])} of the facts of `prompt` and\n"
        f"{percent(both['right']['prompt_2'])} of those of `prompt_2` are right; `prompt_2` has more in {both['wins']['prompt_2']} of "
        f"{both['pictures']} pictures,\n`prompt` in {both['wins']['prompt']}.",
    ]
    return "\n\n".join(parts)


def curve_table(curve: dict[str, Any]) -> str:
    """The shares that are right, a row for each number of samples seen; `curve` as curve.py writes it."""
    names = list(curve["points"][0]["obedience"])
    rows = [
        (f"{point['samples']:,}", "yes" if point["layout"] else "no", *(percent(point["obedience"][name]["share"]) for name in names))
        for point in curve["points"]
    ]
    return table(("samples seen", "layout asked", *names), rows)


def scale_table(curve: dict[str, Any]) -> str:
    """The shares that are right at each scale of true guidance; `curve` as curve.py writes it."""
    found = curve["scales"]["obedience"]
    rows = [(scale, *(percent(each["share"]) for each in obedience.values())) for scale, obedience in found.items()]
    return table(("true CFG", *next(iter(found.values()))), rows)


# A section of the report and how it is written; those that a report does not have are left out.
SECTIONS = {
    "obedience": ("Obedience", obedience_section),
    "vae": ("Autoencoder", vae_section),
    "behaviour": ("Blocks and knobs", behaviour_section),
}


def to_markdown(report: dict[str, Any]) -> str:
    return "\n\n".join(f"## {title}\n\n{write(report)}" for name, (title, write) in SECTIONS.items() if name in report) + "\n"


def write_figure(path: Path, figure: Any) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=90)


def draw_samples(
    path: Path,
    images: UInt8[np.ndarray, "images height width 3"],
    prompts: Sequence[str],
    scores: Sequence[dict[str, bool]],
    rows: int = 3,
) -> None:
    """A sheet of the first pictures under their prompts; what is wrong is named in red below."""
    from matplotlib.figure import Figure

    shown = min(len(images), rows * COLUMNS)
    rows = -(-shown // COLUMNS)
    figure = Figure(figsize=(1.6 * COLUMNS, 2.8 * rows), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, COLUMNS, squeeze=False).flat):
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
        if place < shown:
            wrong = [name for name, right in scores[place].items() if not right]
            axes.imshow(images[place], interpolation="nearest")
            axes.set_title(textwrap.fill(prompts[place], 30), fontsize=6, parse_math=False)
            verdict = textwrap.fill("not right: " + ", ".join(wrong), 30) if wrong else "all right"
            axes.set_xlabel(verdict, fontsize=6, color=WRONG if wrong else RIGHT)
    write_figure(path, figure)


def draw_block_effects(path: Path, effects: Mapping[str, Sequence[float]], sigmas: Sequence[float]) -> None:
    """A bar for every block, on a logarithmic scale: the largest change of the velocity, and a dash for that at each noise level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(effects)), [max(each) for each in effects.values()], color=BAR, label="largest")
    for index, sigma in enumerate(sigmas):
        shade = str(0.75 * index / (len(sigmas) - 1))
        axes.plot([each[index] for each in effects.values()], "_", color=shade, label=f"σ = {sigma:g}")
    axes.axhline(SMALLEST_EFFECT, color=WRONG, linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(0, len(effects), 3), list(effects)[::3], rotation=90, fontsize=7)
    axes.set(xlabel="block taken out", ylabel="change of the velocity, relative to its norm", xlim=(-1, len(effects)))
    axes.legend(fontsize=7, ncols=len(sigmas) + 1)
    write_figure(path, figure)
