"""A walk through the blocks of one pass: both streams behind every block, and the picture that the model would aim at if it stopped there.

Stopping behind a block means that every later block is skipped: its image stream goes through the last norm and projection at once. As a
skipped block hands its input on, this needs no second pass.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flux_lab.instruments.ablate import STREAMS
from flux_lab.instruments.trace import trace
from flux_lab.pipeline import FluxPipeline
from flux_lab.transformer import named_blocks

START = "embedded"
FIELDS = ("text", "image", "velocity", "x0", "distance")


@dataclass(frozen=True)
class Walk:
    """Places in the order of the run: "embedded", in front of the first block, then one behind each block, "double 00" ... "single 37".

    `velocity` is what the model would say if it stopped at a place, `x0` the picture that this velocity aims at, packed, and `distance` how
    far it is from the velocity of the whole model: |v - v_end| / |v_end|, 0 at the last place. A slice of a walk is a walk.
    """

    names: tuple[str, ...]
    text: Float[Tensor, "places length dim"]
    image: Float[Tensor, "places tokens dim"]
    velocity: Float[Tensor, "places tokens patch_channels"]
    x0: Float[Tensor, "places tokens patch_channels"]
    distance: Float[Tensor, "places"]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, part: slice) -> "Walk":
        if not isinstance(part, slice):
            raise TypeError(f"Walk: expected a slice such as [:20], got {part!r}")
        return Walk(self.names[part], *(getattr(self, field)[part] for field in FIELDS))

    def norms(self, stream: str) -> Float[Tensor, "places"]:
        """The length of a token's vector, averaged over the tokens of a stream, "text" or "image"."""
        return self._stream(stream).norm(dim=2).mean(dim=1)

    def turns(self, stream: str) -> Float[Tensor, "steps"]:
        """By how many degrees a block turns a token's vector, averaged over tokens; one number fewer than there are places."""
        unit = torch.nn.functional.normalize(self._stream(stream).double(), dim=2)
        # The angle from the chord: exact for small angles, where the cosine is 1 up to rounding.
        chords = (unit[1:] - unit[:-1]).norm(dim=2)
        return (2 * (chords / 2).clamp(max=1).asin()).rad2deg().mean(dim=1).float()

    def _stream(self, stream: str) -> Tensor:
        if stream not in STREAMS:
            raise ValueError(f"stream: expected 'text' or 'image', got {stream!r}")
        return getattr(self, stream)


def walk(pipe: FluxPipeline, prompt: str, step: int = 0, num_inference_steps: int = 28, **arguments: Any) -> Walk:
    """Run the loop up to `step`, counted from 0, and walk through the blocks of that step.

    Further arguments are those of `FluxPipeline.steps`, where `sigmas` decide over the number of steps; of a batch the first picture is
    taken. Raises ValueError for a step that does not exist.
    """
    sigmas = arguments.get("sigmas")
    count = num_inference_steps if sigmas is None else len(sigmas)
    if not 0 <= step < count:
        raise ValueError(f"step: expected 0 to {count - 1}, got {step}")
    here = f"step {step:02d}"
    seen = [f"{here}/{kind} ??/{stream}" for kind in ("double", "single") for stream in STREAMS]
    with trace(pipe, only=[*seen, f"{here}/embedded/*", f"{here}/conditioning", f"{here}/input/latents"]) as recorded:
        states = pipe.steps(prompt, num_inference_steps=num_inference_steps, **arguments)
        state = next(islice(states, step, None))
        states.close()
    names = (START, *named_blocks(pipe.transformer))
    places = [f"{here}/{START}/{{}}", *(f"{here}/{name}/{{}}" for name in names[1:])]
    text, image = (torch.cat([recorded[place.format(stream)][:1] for place in places]) for stream in STREAMS)
    velocity = stopped(pipe, image, recorded[f"{here}/conditioning"][:1])
    x0 = recorded[f"{here}/input/latents"][:1] - state.sigma * velocity
    distance = (velocity - velocity[-1]).flatten(1).norm(dim=1) / velocity[-1].norm()
    return Walk(names, text, image, velocity, x0, distance)


@torch.no_grad()
def stopped(pipe: FluxPipeline, image: Tensor, temb: Tensor) -> Tensor:
    """The velocity from image streams [places, tokens, dim] and the conditioning vector [1, dim]: last norm, last projection."""
    model = pipe.transformer
    return model.proj_out(model.norm_out(image.to(pipe.device), temb.to(pipe.device).expand(len(image), -1))).cpu()
