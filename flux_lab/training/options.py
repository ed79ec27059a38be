"""The arguments that the two text encoders' stages share."""

import argparse
from pathlib import Path

from flux_lab.training.loop import Settings


def text_stage_options(doc: str, arguments: list[str] | None, out: Path, steps: int) -> tuple[argparse.Namespace, Settings]:
    """What the command line says, with `out` and `steps` as defaults, and the settings of the run that follow from it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--tokenizers", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return options, Settings(steps=options.steps, batch_size=options.batch, learning_rate=options.rate, seed=options.seed)
