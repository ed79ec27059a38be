"""Modulation hoisting: evaluate every adaptive layer norm's linear for all steps before the loop, then drop its weights.

What these layers say, shift, scale and gate of every channel, depends on the time, the guidance scale and CLIP's vector, but not on the
picture. All of it is known before the first step. FLUX.1-dev has 27 % of its parameters in them; the table of what they say in 28 steps
takes less than one hundredth of that. Each entry is computed by the same operation on the same numbers as in the loop, so the result is
the same to the last bit.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from flux_lab.config import FluxTransformer2DConfig
from flux_lab.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from flux_lab.pipeline import FluxPipeline
from flux_lab.transformer import TIME_SCALE, FluxTransformer2DModel

ADAPTIVE_NORMS = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)
# What one pass of the network is conditioned on, as `time_text_embed` is called: timestep, guidance if there is one, pooled text.
Conditioning = tuple[Tensor, ...]


def modulation_linears(transformer: nn.Module) -> dict[str, nn.Module]:
    """Name -> the linear of every adaptive layer norm; of a hoisted transformer none."""
    norms = {name: module for name, module in transformer.named_modules() if isinstance(module, ADAPTIVE_NORMS)}
    return {f"{name}.linear": norm.linear for name, norm in norms.items() if not isinstance(norm.linear, HoistedModulation)}


# --------------------------------------------------------------------------------------------- what the loop is going to ask for


class Rehearsal(nn.Module):
    """Stands in for the transformer: writes down what each pass is conditioned on, and answers with zeros."""

    def __init__(self, config: FluxTransformer2DConfig):
        super().__init__()
        self.config = config
        self.conditionings: list[Conditioning] = []

    def forward(
        self, hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor, guidance: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        numbers = [value.to(hidden_states.dtype) * TIME_SCALE for value in (timestep, guidance) if value is not None]
        self.conditionings.append((*numbers, pooled_projections))
        return torch.zeros_like(hidden_states)


def rehearse(pipe: FluxPipeline, *prompts: Any, **arguments: Any) -> list[Conditioning]:
    """What `pipe.steps` with these arguments conditions each pass on, found by running its loop without the network.

    The arguments are those of `steps`. No random number is drawn from the generator given, nor from torch's own.
    """
    rehearsing = copy.copy(pipe)
    rehearsing.transformer = Rehearsal(pipe.transformer.config)
    rehearsing.scheduler = copy.deepcopy(pipe.scheduler)
    with warnings.catch_warnings(action="ignore"):  # the loop itself will say it
        for _ in rehearsing.steps(*prompts, **arguments | {"generator": torch.Generator()}):
            pass
    return rehearsing.transformer.conditionings


# ----------------------------------------------------------------------------------------------------------------- the hoisted model


@dataclass
class Now:
    """Which of the conditionings the pass that runs now has: shared by all that stands in for a linear."""

    index: int = 0


class HoistedConditioning(nn.Module):
    """Takes the place of `time_text_embed`: finds out which of the known conditionings this is."""

    def __init__(self, known: Sequence[Conditioning], dim: int, now: Now):
        super().__init__()
        self.known, self.dim, self.now = list(known), dim, now

    def forward(self, *given: Tensor) -> Tensor:
        """Zeros in the place of the conditioning vector, which nothing reads any more: [batch, dim].

        Raises ValueError for a conditioning that the table was not made for.
        """
        if not given[0].is_meta:  # numbers that are not there are equal to all others: for the memory planner
            self.now.index = self._find(given)
        return given[-1].new_zeros(len(given[-1]), self.dim)

    def _find(self, given: Conditioning) -> int:
        for index, known in enumerate(self.known):
            if len(known) == len(given) and all(map(torch.equal, known, given)):
                return index
        number = f"timestep {given[0].flatten()[0].item():g} for a batch of {len(given[0])}"
        raise ValueError(f"hoisted for {len(self.known)} other conditionings, got {number}: hoist again for other steps, guidance or text")


class HoistedModulation(nn.Module):
    """Takes the place of an adaptive layer norm's linear: looks up what it would say."""

    def __init__(self, table: Tensor, now: Now):
        super().__init__()
        self.now = now
        self.register_buffer("table", table, persistent=False)

    def forward(self, _: Tensor) -> Tensor:
        return self.table[self.now.index]


Fetch = Callable[[str, nn.Module], dict[str, Tensor]]


def own_weights(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module, which are in memory."""
    return dict(module.state_dict())


@torch.no_grad()
def hoist(transformer: FluxTransformer2DModel, conditionings: Sequence[Conditioning], fetch: Fetch = own_weights) -> FluxTransformer2DModel:
    """A transformer without modulation weights that gives the same result, bit for bit, for these conditionings alone.

    It shares all other weights with `transformer`, which is left as it is: drop it, and the modulation weights are freed. `fetch` gives
    the weights of one module at a time, so they may lie in a file. Raises ValueError when there is no conditioning, or no such weight.
    """
    if not conditionings:
        raise ValueError("conditionings: expected at least one pass, got none")
    if not modulation_linears(transformer):
        raise ValueError("transformer: expected one with modulation weights, got one that is hoisted already")
    tensors = chain(transformer.parameters(), transformer.buffers())
    hoisted = copy.deepcopy(transformer, memo={id(tensor): tensor for tensor in tensors})
    now = Now()
    hoisted.time_text_embed = HoistedConditioning(conditionings, transformer.config.inner_dim, now)
    weights = fetch("time_text_embed", transformer.time_text_embed)
    # One pass after the other, not all in one product: it would round differently.
    signals = [F.silu(functional_call(transformer.time_text_embed, weights, each)) for each in conditionings]
    for name, linear in modulation_linears(transformer).items():
        weights = fetch(name, linear)
        table = torch.stack([functional_call(linear, weights, signal) for signal in signals])
        hoisted.set_submodule(name, HoistedModulation(table, now))
    return hoisted
