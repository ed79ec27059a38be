"""flux_lab.attention equals diffusers' FluxAttention, and its seams show what they promise."""

import pytest
import torch
from conftest import assert_parity, copy_weights, randomize_
from diffusers.models.transformers.transformer_flux import FluxAttention as ReferenceAttention

from flux_lab.attention import FluxAttention
from flux_lab.rope import FluxPosEmbed
from flux_lab.shapes import ShapeError

DIM, HEADS, HEAD_DIM = 24, 3, 8
AXES = (2, 2, 4)


def make_pair(joint, dtype=torch.float32):
    kind = {"added_kv_proj_dim": DIM} if joint else {"pre_only": True}
    reference = ReferenceAttention(DIM, heads=HEADS, dim_head=HEAD_DIM, out_dim=DIM, bias=True, eps=1e-6, **kind)
    reference = randomize_(reference).to(dtype)
    return copy_weights(FluxAttention(DIM, heads=HEADS, dim_head=HEAD_DIM, **kind), reference), reference


def make_inputs(joint, dtype=torch.float32):
    inputs = {"hidden_states": torch.randn(2, 11, DIM).to(dtype)}
    if joint:
        inputs["encoder_hidden_states"] = torch.randn(2, 5, DIM).to(dtype)
    length = 16 if joint else 11
    return inputs | {"image_rotary_emb": FluxPosEmbed(10000.0, AXES)(torch.randint(0, 9, (length, 3)).float())}


def both(joint, dtype):
    ours, reference = make_pair(joint, dtype)
    inputs = make_inputs(joint, dtype)
    given, wanted = ours(**inputs), reference(**inputs)
    return (given, wanted) if joint else ((given,), (wanted,))


@pytest.mark.parametrize("joint", [True, False])
def test_parity(joint, dtype):
    for given, wanted in zip(*both(joint, dtype), strict=True):
        assert_parity(given, wanted)


def test_image_before_text_is_noticed():
    ours, reference = make_pair(joint=True)
    inputs = make_inputs(joint=True)
    cos, sin = inputs["image_rotary_emb"]
    rolled = inputs | {"image_rotary_emb": (cos.roll(11, dims=0), sin.roll(11, dims=0))}
    assert not torch.allclose(ours(**rolled)[0], reference(**inputs)[0], atol=1e-4)


def test_a_missing_query_norm_is_noticed():
    ours, reference = make_pair(joint=True)
    ours.norm_q = torch.nn.Identity()
    inputs = make_inputs(joint=True)
    assert not torch.allclose(ours(**inputs)[0], reference(**inputs)[0], atol=1e-4)


def test_padding_is_attended_to():
    ours, _ = make_pair(joint=True)
    inputs = make_inputs(joint=True)
    other = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].index_fill(1, torch.tensor([4]), 0.0)}
    assert not torch.allclose(ours(**inputs)[0], ours(**other)[0], atol=1e-4)


def test_hooks_see_queries_and_keys_before_and_after_the_rotation():
    ours, _ = make_pair(joint=True)
    seen = {}
    ours.rope.register_forward_hook(lambda module, args, result: seen.update(before=args[0], after=result[0]))
    ours.attend.register_forward_hook(lambda module, args, result: seen.update(query=args[0], result=result))
    inputs = make_inputs(joint=True)
    ours(**inputs)
    assert seen["before"].shape == seen["after"].shape == seen["result"].shape == (2, 16, HEADS, HEAD_DIM)
    assert torch.equal(seen["after"], seen["query"])
    assert not torch.equal(seen["before"], seen["after"])


def test_clear_error():
    ours, _ = make_pair(joint=True)
    inputs = make_inputs(joint=True) | {"encoder_hidden_states": torch.zeros(2, 5, DIM + 1)}
    with pytest.raises(
        ShapeError, match=rf"FluxAttention.forward: argument `encoder_hidden_states`: expected float \[batch=2 length dim={DIM}\]"
    ):
        ours(**inputs)
