"""Between the stages: make a transformer deeper without changing what it computes.

    python -m flux_lab.training.grow --initial runs/flow/transformer --out runs/grown

A block whose gates are zero is the identity. Copies of the blocks, with zero gates, are put behind them until there are 19 + 38; trained
on, the new blocks come to matter. Writes `transformer/` (a diffusers folder).
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

# Which chunks of the modulation linear are gates.
GATES = {AdaLayerNormZero: (2, 5), AdaLayerNormZeroSingle: (2,)}


def gates(block: nn.Module) -> Iterator[Tensor]:
    """The rows of a block's modulation linears that make its gates: weights and biases, as views."""
    for module in block.modules():
        for chunk in GATES.get(type(module), ()):
            rows = slice(chunk * module.linear.in_features, (chunk + 1) * module.linear.in_features)
            yield from (module.linear.weight[rows], module.linear.bias[rows])


@torch.no_grad()
def close_gates(block: nn.Module) -> nn.Module:
    """Set all gates of a block to zero."""
    for gate in gates(block):
        gate.zero_()
    return block


def grow_list(blocks: nn.ModuleList, count: int) -> nn.ModuleList:
    """`count` blocks: the old ones, evenly spread and in their order, each followed by its closed copies. Raises ValueError for fewer."""
    if count < len(blocks):
        raise ValueError(f"cannot grow {len(blocks)} blocks to {count}: expected at least as many")
    origins = [place * len(blocks) // count for place in range(count)]
    return nn.ModuleList(
        blocks[origin] if place == origins.index(origin) else close_gates(copy.deepcopy(blocks[origin]))
        for place, origin in enumerate(origins)
    )


def grow(transformer: FluxTransformer2DModel, num_layers: int, num_single_layers: int) -> FluxTransformer2DModel:
    """The same function with more blocks."""
    transformer = copy.deepcopy(transformer)
    transformer.transformer_blocks = grow_list(transformer.transformer_blocks, num_layers)
    transformer.single_transformer_blocks = grow_list(transformer.single_transformer_blocks, num_single_layers)
    transformer.config = dataclasses.replace(transformer.config, num_layers=num_layers, num_single_layers=num_single_layers)
    return transformer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial", type=Path, default=Path("runs/flow/transformer"))
    parser.add_argument("--out", type=Path, default=Path("runs/grown"))
    parser.add_argument(
        "--layers", type=int, nargs=2, default=(FLUX_MINI.num_layers, FLUX_MINI.num_single_layers), metavar=("DOUBLE", "SINGLE")
    )
    options = parser.parse_args(arguments)
    save_model(grow(load_transformer(options.initial), *options.layers), options.out / "transformer")


if __name__ == "__main__":
    main()
