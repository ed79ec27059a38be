"""Between the stages: make a transformer deeper while it computes nearly the same.

    python -m flux_lab.training.grow --initial runs/distilled/transformer --out runs/grown

Copies of each block are put behind it. A block adds its branches to the streams through gates: the first keeps most of their strength,
its copies get equal parts of the rest. With a share of 0 the copies are closed and the function is exactly the same, but blocks that do
nothing learn slowly; with a share of 0.45 every block does something from the first step on, and training soon closes the difference.
Writes `transformer/` (a diffusers folder).
"""

import argparse
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from flux_lab.checkpoints import load_transformer, save_model
from flux_lab.config import FLUX_MINI
from flux_lab.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from flux_lab.transformer import FluxTransformer2DModel

SHARE = 0.45
# Which chunks of the modulation linear are gates.
GATES = {AdaLayerNormZero: (2, 5), AdaLayerNormZeroSingle: (2,)}


def gates(block: nn.Module) -> Iterator[Tensor]:
    """The rows of a block's modulation linears that make its gates: weights and biases, as views."""
    for module in block.modules():
        for chunk in GATES.get(type(module), ()):
            rows = slice(chunk * module.linear.in_features, (chunk + 1) * module.linear.in_features)
            yield from (module.linear.weight[rows], module.linear.bias[rows])


@torch.no_grad()
def with_gates(block: nn.Module, strength: float) -> nn.Module:
    """A copy of the block whose gates are multiplied by `strength`."""
    copied = copy.deepcopy(block)
    for gate in gates(copied):
        gate *= strength
    return copied


def grow_list(blocks: nn.ModuleList, count: int, share: float) -> nn.ModuleList:
    """`count` blocks: the old ones, evenly spread and in their order, each followed by its copies. Raises ValueError for fewer."""
    if count < len(blocks):
        raise ValueError(f"cannot grow {len(blocks)} blocks to {count}: expected at least as many")
    origins = [place * len(blocks) // count for place in range(count)]
    grown = []
    for place, origin in enumerate(origins):
        copies = origins.count(origin) - 1
        first = place == origins.index(origin)
        strength = (1 - share if copies else 1.0) if first else share / copies
        grown.append(with_gates(blocks[origin], strength))
    return nn.ModuleList(grown)


def grow(transformer: FluxTransformer2DModel, num_layers: int, num_single_layers: int, share: float = SHARE) -> FluxTransformer2DModel:
    """More blocks; the copies do `share` of the work of the blocks that they copy."""
    transformer = copy.deepcopy(transformer)
    transformer.transformer_blocks = grow_list(transformer.transformer_blocks, num_layers, share)
    transformer.single_transformer_blocks = grow_list(transformer.single_transformer_blocks, num_single_layers, share)
    transformer.config = dataclasses.replace(transformer.config, num_layers=num_layers, num_single_layers=num_single_layers)
    return transformer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial", type=Path, default=Path("runs/distilled/transformer"))
    parser.add_argument("--out", type=Path, default=Path("runs/grown"))
    parser.add_argument(
        "--layers", type=int, nargs=2, default=(FLUX_MINI.num_layers, FLUX_MINI.num_single_layers), metavar=("DOUBLE", "SINGLE")
    )
    parser.add_argument("--share", type=float, default=SHARE, help="of each block's work, for its copies; 0: the function stays exactly")
    options = parser.parse_args(arguments)
    if not 0 <= options.share <= 1:
        parser.error(f"--share: expected a number from 0 to 1, got {options.share}")
    save_model(grow(load_transformer(options.initial), *options.layers, options.share), options.out / "transformer")


if __name__ == "__main__":
    main()
