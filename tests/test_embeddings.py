"""flux_lab.embeddings equals diffusers' conditioning modules."""

import pytest
import torch
from conftest import assert_parity, copy_weights, randomize_
from diffusers.models import embeddings as reference_embeddings

from flux_lab.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    get_timestep_embedding,
)
from flux_lab.shapes import ShapeError

NUMBERS = torch.tensor([0.0, 1.0, 321.5, 999.9, 3500.0])


def test_sinusoids(dtype):
    numbers = NUMBERS.to(dtype)
    expected = reference_embeddings.get_timestep_embedding(numbers, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(get_timestep_embedding(numbers), expected)
    assert not torch.equal(get_timestep_embedding(numbers).roll(128, dims=1), expected), "sines first would be noticed"


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (TimestepEmbedding(12, 20), reference_embeddings.TimestepEmbedding(12, 20)),
        (PixArtAlphaTextProjection(12, 20), reference_embeddings.PixArtAlphaTextProjection(12, 20, act_fn="silu")),
    ],
    ids=["time", "text"],
)
def test_the_mlps(ours, reference, dtype):
    reference = randomize_(reference).to(dtype)
    sample = torch.randn(3, 12).to(dtype)
    assert_parity(copy_weights(ours, reference)(sample), reference(sample))


@pytest.mark.parametrize("guided", [True, False])
def test_conditioning_vector(guided, dtype):
    name = "CombinedTimestepGuidanceTextProjEmbeddings" if guided else "CombinedTimestepTextProjEmbeddings"
    ours = CombinedTimestepGuidanceTextProjEmbeddings if guided else CombinedTimestepTextProjEmbeddings
    reference = randomize_(getattr(reference_embeddings, name)(24, 10)).to(dtype)
    ours = copy_weights(ours(24, 10), reference)
    inputs = [NUMBERS[:3].to(dtype), NUMBERS[2:].to(dtype), torch.randn(3, 10).to(dtype)]
    inputs = inputs if guided else inputs[::2]
    assert_parity(ours(*inputs), reference(*inputs))
    if guided:
        swapped = [inputs[1], inputs[0], inputs[2]]
        assert not torch.allclose(ours(*swapped), reference(*inputs)), "guidance in place of time would be noticed"


def test_clear_error():
    with pytest.raises(
        ShapeError, match=r"CombinedTimestepTextProjEmbeddings.forward: argument `pooled_projection`: expected float \[batch=2 pooled_dim\]"
    ):
        CombinedTimestepTextProjEmbeddings(24, 10)(torch.zeros(2), torch.zeros(3, 10))
