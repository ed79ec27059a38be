"""flux_lab.inference.benchmark_cases: every case gives the same on all sides, from the same weights."""

import dataclasses

import pytest
import torch
from test_pipeline import KINDS, write_random

from flux_lab.config import TINY, TINY_CLIP, TINY_T5, TINY_VAE
from flux_lab.inference.benchmark import measure
from flux_lab.inference.benchmark_cases import CASES, COMPILED, FAST, OURS, QUICK, REFERENCE, UNCHECKED, Settings, same_weights
from flux_lab.transformer import FluxTransformer2DModel


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random(folder, *KINDS["dev"])
    return Settings(
        repeats=1,
        steps=2,
        batches=(1, 3),
        growth_tokens=(9, 16),
        growth_batches=(2,),
        blocks=TINY,
        side=3,
        length=7,
        t5=TINY_T5,
        clip=TINY_CLIP,
        vae=TINY_VAE,
        pixels=24,
        product=16,
        folder=folder,
    )


COUNTS = {
    "step": 1,
    "end-to-end": 1,
    "end-to-end-batches": 1,
    "clip": 1,
    "t5": 1,
    "vae": 1,
    "blocks-fp32": 1,
    "blocks-bf16": 1,
    "growth": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_sides_agree(settings, name):
    cases = list(CASES[name](settings))
    assert len({case.name for case in cases}) == COUNTS[name]
    for case in cases:
        results = {result.side: result for result in measure(case, settings, rate=1e9)}
        assert set(results) - {UNCHECKED} == {REFERENCE, OURS, FAST}
        for side, result in results.items():
            assert result.error < (1e-4 if case.dtype == torch.float32 else 0.05), side
            assert result.peak_bytes > 0
            assert result.flops <= results[REFERENCE].flops


def test_import(settings):
    assert "import" in CASES
    (case,) = CASES["import"](settings)
    assert set(case.sides) == {REFERENCE, OURS, FAST}
    assert case.sides[OURS]() is None


def test_compiled_is_a_side_of_its_own(settings):
    (case,) = CASES["step"](dataclasses.replace(settings, compile=True))
    assert list(case.sides) == [REFERENCE, OURS, FAST, COMPILED, UNCHECKED]


def test_weights_are_the_very_same():
    from diffusers import FluxTransformer2DModel as Reference

    ours = FluxTransformer2DModel(TINY)
    reference = same_weights(Reference.from_config(TINY.to_dict()), ours)
    assert {each.data_ptr() for each in reference.parameters()} == {each.data_ptr() for each in ours.parameters()}


def test_all_that_is_asked_for_is_there():
    assert set(CASES) == {"import", *COUNTS}
    full = Settings()
    assert (full.steps, full.batches, full.side**2, full.length, full.pixels) == (28, (1, 8), 1024, 512, 512)
    assert (full.blocks.inner_dim, full.blocks.num_layers, full.blocks.num_single_layers) == (3072, 2, 4)
    assert full.growth_tokens == (256, 1024, 4096)
    assert QUICK.repeats < full.repeats
