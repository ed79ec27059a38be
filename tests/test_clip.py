"""CLIP's text encoder against transformers' on random weights."""

import dataclasses

import pytest
import torch
import transformers
from conftest import randomize_

from flux_lab import clip
from flux_lab.clip import CLIPAttend, CLIPTextModel
from flux_lab.config import FLUX_CLIP, MINI_CLIP, TINY_CLIP
from flux_lab.shapes import ShapeError

CONFIGS = {
    "tiny": TINY_CLIP,
    "new end token": dataclasses.replace(TINY_CLIP, eos_token_id=599, hidden_size=24, num_attention_heads=3, num_hidden_layers=3),
    "wide eps": dataclasses.replace(TINY_CLIP, layer_norm_eps=1e-3, intermediate_size=50, num_attention_heads=2),
    "FLUX.1's depth": dataclasses.replace(TINY_CLIP, num_hidden_layers=FLUX_CLIP.num_hidden_layers),
    "miniature": MINI_CLIP,
}
ULPS = 2
EPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def both(config, dtype=torch.float32):
    """Transformers' model with random weights, and ours with the same ones."""
    upstream_config = transformers.CLIPTextConfig.from_dict(config.to_dict() | {"bos_token_id": None})
    reference = randomize_(transformers.CLIPTextModel(upstream_config)).to(dtype)
    ours = CLIPTextModel(config).to(dtype).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def some_ids(config, length=None, batch=3):
    """Prompts as the tokenizer makes them: the highest id ends the text and pads it."""
    length = length or min(config.max_position_embeddings, 16)
    ids = torch.randint(3, config.vocab_size - 2, (batch, length))
    ids[:, 0] = config.vocab_size - 2
    for row in range(batch):
        ids[row, length - 1 - 2 * row :] = config.vocab_size - 1
    return ids


def differences(ours, reference, ids):
    """Ours minus transformers', as the largest absolute difference of both outputs."""
    with torch.no_grad():
        got, expected = ours(ids), reference(ids)
    return max((a - b).abs().max().item() for a, b in zip(got, (expected.last_hidden_state, expected.pooler_output), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_in_fp32(name):
    ours, reference = both(CONFIGS[name])
    ids = some_ids(CONFIGS[name])
    with torch.no_grad():
        got, expected = ours(ids), reference(ids)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_within_two_units_in_the_last_place(name, dtype):
    ours, reference = both(CONFIGS[name], dtype)
    ids = some_ids(CONFIGS[name])
    with torch.no_grad():
        got, expected = ours(ids), reference(ids)
    for mine, theirs in zip(got, (expected.last_hidden_state, expected.pooler_output), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=ULPS * EPS[dtype], atol=0)


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_any_length_up_to_the_position_embeddings(length):
    ours, reference = both(TINY_CLIP)
    assert differences(ours, reference, some_ids(TINY_CLIP, length, batch=1)) < 1e-5


@pytest.mark.parametrize("eos_token_id", [2, 599, 77])
def test_pooled_token_is_the_one_transformers_takes(eos_token_id):
    """Also for sequences with several end tokens, with a higher id than the end token, and without an end token."""
    ours, reference = both(dataclasses.replace(TINY_CLIP, eos_token_id=eos_token_id))
    ids = torch.randint(0, 600, (40, 9))
    ids[::2, 4] = eos_token_id
    ids[::3, 6] = 599
    assert differences(ours, reference, ids) < 1e-5


def test_later_tokens_do_not_change_earlier_ones():
    ours, _ = both(TINY_CLIP)
    ids = some_ids(TINY_CLIP)
    changed = ids.clone()
    changed[:, 10:] = 5
    torch.testing.assert_close(ours(ids).last_hidden_state[:, :10], ours(changed).last_hidden_state[:, :10], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("quick_gelu", lambda x: torch.nn.functional.gelu(x)),
        ("CLIPAttend.forward", lambda self, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v)),
        ("CLIPTextModel.pooled_positions", lambda self, ids: ids.new_full((len(ids),), ids.shape[1] - 1)),
        ("CLIPMLP.forward", lambda self, x: self.fc2(clip.quick_gelu(self.fc1(x))) - self.fc2.bias),
    ],
    ids=["another gelu", "no causal mask", "last instead of end token", "missing bias"],
)
def test_parity_fails_on_a_planted_bug(monkeypatch, name, bug):
    ours, reference = both(TINY_CLIP)
    ids = some_ids(TINY_CLIP)
    assert differences(ours, reference, ids) < 1e-5
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(clip, owner) if owner else clip, attribute, bug)
    assert differences(ours, reference, ids) > 1e-3


def test_a_hook_sees_queries_keys_values_and_the_probabilities():
    ours, _ = both(TINY_CLIP)
    seen = {}

    def look(module, inputs, output):
        queries, keys, values = inputs
        seen.update(probabilities=module.probabilities(queries, keys), values=values, output=output)

    ours.encoder.layers[1].self_attn.attend.register_forward_hook(look)
    ours(some_ids(TINY_CLIP))
    assert seen["probabilities"].shape == (3, 4, 16, 16)
    assert (seen["probabilities"].triu(1) == 0).all()
    torch.testing.assert_close(seen["probabilities"] @ seen["values"], seen["output"], rtol=1e-5, atol=1e-5)


def test_parameters_of_flux():
    with torch.device("meta"):
        model = CLIPTextModel(FLUX_CLIP)
    assert sum(parameter.numel() for parameter in model.parameters()) == 123_060_480


def test_trains():
    torch.manual_seed(0)
    model = CLIPTextModel(TINY_CLIP)
    pooled = model(some_ids(TINY_CLIP)).pooler_output
    pooled.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_from_config_reads_the_upstream_json():
    upstream = transformers.CLIPTextConfig(hidden_size=20, num_attention_heads=4, vocab_size=600, eos_token_id=2, bos_token_id=0)
    assert CLIPTextModel.from_config(upstream.to_dict()).config.hidden_size == 20
    with pytest.raises(ValueError, match="hidden_act='gelu' is not supported"):
        CLIPTextModel.from_config(upstream.to_dict() | {"hidden_act": "gelu"})


def test_bad_input():
    model = CLIPTextModel(TINY_CLIP)
    with pytest.raises(ValueError, match=r"17 tokens.*max_position_embeddings=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"CLIPTextModel.forward: argument `input_ids`: expected int \[batch length\], got int64 \[7\]"):
        model(torch.zeros(7, dtype=torch.long))
    with pytest.raises(ShapeError, match="got float32"):
        model(torch.zeros(1, 7))


def test_attention_product_is_parameter_free():
    assert not list(CLIPAttend().parameters())
