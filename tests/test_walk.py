"""instruments.walk: what it says about stopping behind a block is what the model says when the later blocks are skipped."""

import dataclasses
from itertools import islice

import pytest
import torch
from test_pipeline import KINDS, write_random

from flux_lab.instruments.ablate import ablate
from flux_lab.instruments.walk import Walk, walk
from flux_lab.pipeline import FluxPipeline

RUN = {"height": 32, "width": 48, "max_sequence_length": 12, "num_inference_steps": 3}


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random(folder, *KINDS["dev"])
    return FluxPipeline.from_pretrained(folder)


def last_state(pipe, step):
    return next(islice(pipe.steps("a red cube", generator=seeded(), **RUN), step, None))


@pytest.mark.parametrize("step", [0, 2])
def test_stopping_equals_skipping_the_later_blocks(pipe, step):
    walked = walk(pipe, "a red cube", step=step, generator=seeded(), **RUN)
    config = pipe.transformer.config
    blocks = [("double", index) for index in range(config.num_layers)] + [("single", index) for index in range(config.num_single_layers)]
    assert walked.names == ("embedded", *(f"{kind} {index:02d}" for kind, index in blocks))
    state = last_state(pipe, step)
    torch.testing.assert_close(walked.velocity[-1:], state.velocity)
    torch.testing.assert_close(walked.x0[-1:], state.x0)
    assert walked.distance[-1] == 0

    inputs = {}
    with pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True):
        last_state(pipe, step)
    for place in range(len(walked)):
        off = {kind: [index for other, index in blocks[place:] if other == kind] for kind in ("double", "single")}
        with ablate(pipe, **off), torch.no_grad():
            velocity = pipe.transformer(**inputs)
        torch.testing.assert_close(walked.velocity[place : place + 1], velocity)
        relative = (velocity - state.velocity).norm() / state.velocity.norm()
        torch.testing.assert_close(walked.distance[place], relative, atol=1e-6, rtol=1e-5)


def test_a_block_that_does_nothing_turns_nothing(pipe):
    with ablate(pipe, double=1):
        walked = walk(pipe, "a red cube", generator=seeded(), **RUN)
    place = walked.names.index("double 01")
    for stream in ("text", "image"):
        turns, norms = walked.turns(stream), walked.norms(stream)
        assert turns[place - 1] == 0
        assert norms[place] == norms[place - 1]
        assert (turns > 0).sum() == len(turns) - 1
    assert walked.distance[place] == walked.distance[place - 1]


def test_norms_and_turns_are_lengths_and_angles():
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[-8.0, 6.0], [0.0, 1.0]], [[8.0, -6.0], [1.0, 1.0]]])
    walked = Walk(("a", "b", "c"), tokens[:, :1], tokens, tokens, tokens, torch.zeros(3))
    torch.testing.assert_close(walked.norms("image"), torch.tensor([3.5, 5.5, (10 + 2**0.5) / 2]))
    torch.testing.assert_close(walked.turns("image"), torch.tensor([45.0, (180 + 45) / 2]))
    torch.testing.assert_close(walked.turns("text"), torch.tensor([90.0, 180.0]))


def test_the_sigmas_count_the_steps(pipe):
    sigmas = [0.9, 0.7, 0.4, 0.2]
    walked = walk(pipe, "a red cube", step=3, sigmas=sigmas, generator=seeded(), **RUN)
    *_, state = pipe.steps("a red cube", sigmas=sigmas, generator=seeded(), **RUN)
    torch.testing.assert_close(walked.velocity[-1:], state.velocity)


def test_a_part_of_a_walk_is_a_walk(pipe):
    walked = walk(pipe, "a red cube", generator=seeded(), **RUN)
    part = walked[1:3]
    assert part.names == ("double 00", "double 01")
    for field in dataclasses.fields(Walk):
        assert len(getattr(part, field.name)) == len(part) == 2
    assert torch.equal(part.turns("text"), walked.turns("text")[1:2])


def test_bad_arguments_are_refused(pipe):
    with pytest.raises(ValueError, match="step: expected 0 to 2, got 3"):
        walk(pipe, "a red cube", step=3, **RUN)
    with pytest.raises(ValueError, match="step: expected 0 to 1, got 2"):
        walk(pipe, "a red cube", step=2, sigmas=[1.0, 0.5], **RUN)
    walked = walk(pipe, "a red cube", **RUN)
    with pytest.raises(ValueError, match="stream: expected 'text' or 'image', got 'picture'"):
        walked.norms("picture")
    with pytest.raises(TypeError, match=r"Walk: expected a slice such as \[:20\], got 3"):
        walked[3]
