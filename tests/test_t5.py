"""T5's encoder against transformers' on random weights."""

import dataclasses

import pytest
import torch
import transformers
from conftest import randomize_
from transformers.models.t5.modeling_t5 import T5Attention as ReferenceAttention

from flux_lab import t5
from flux_lab.config import FLUX_T5, MINI_T5, TINY_T5
from flux_lab.shapes import ShapeError
from flux_lab.t5 import T5EncoderModel, relative_position_bucket

CONFIGS = {
    "tiny": TINY_T5,
    "more buckets": dataclasses.replace(TINY_T5, relative_attention_num_buckets=12, relative_attention_max_distance=20, num_layers=3),
    "wide eps": dataclasses.replace(TINY_T5, layer_norm_epsilon=1e-2, d_kv=10, num_heads=2, d_ff=34),
    "FLUX.1's depth": dataclasses.replace(TINY_T5, num_layers=FLUX_T5.num_layers),
    "miniature": MINI_T5,
}
EPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def both(config, dtype=torch.float32, wo_dtype=None):
    """Transformers' model with random weights, and ours with the same ones."""
    reference = randomize_(transformers.T5EncoderModel(transformers.T5Config.from_dict(config.to_dict()))).to(dtype)
    ours = T5EncoderModel(config).to(dtype).eval()
    for model in (ours, reference):
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.to(wo_dtype or dtype)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def some_ids(config, length=19, batch=3):
    ids = torch.randint(3, config.vocab_size, (batch, length))
    ids[1, length // 2 :] = 0
    return ids


def difference(ours, reference, ids):
    with torch.no_grad():
        return (ours(ids) - reference(ids).last_hidden_state).abs().max().item()


@pytest.mark.parametrize("length", [1, 7, 150])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_in_fp32(name, length):
    ours, reference = both(CONFIGS[name])
    ids = some_ids(CONFIGS[name], length)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), reference(ids).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "wo_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float16, torch.float32)],
    ids=["bf16", "fp16", "fp16 with wo in fp32"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_within_two_units_in_the_last_place(name, dtype, wo_dtype):
    ours, reference = both(CONFIGS[name], dtype, wo_dtype)
    ids = some_ids(CONFIGS[name])
    with torch.no_grad():
        got, expected = ours(ids), reference(ids).last_hidden_state
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=2 * EPS[dtype], atol=0)


def test_fp16_that_overflows_is_clamped_as_in_transformers():
    ours, reference = both(TINY_T5, torch.float16)
    for model in (ours, reference):
        model.requires_grad_(False).encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(3e4)
    ids = some_ids(TINY_T5)
    seen = []
    ours.encoder.block[0].layer[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        got, expected = ours(ids), reference(ids).last_hidden_state
    assert seen[0].isinf().any()
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=2 * EPS[torch.float16], atol=0)


def test_clamp_leaves_finite_numbers_and_other_dtypes():
    top = torch.finfo(torch.float16).max
    assert t5.clamp_fp16(torch.tensor([top, -top], dtype=torch.float16)).tolist() == [top, -top]
    clamped = t5.clamp_fp16(torch.tensor([float("inf"), -top, 3.0], dtype=torch.float16))
    assert clamped.tolist() == [64512.0, -64512.0, 3.0]
    assert t5.clamp_fp16(torch.tensor([float("inf")])).isinf().all()


@pytest.mark.parametrize("max_distance", [17, 20, 32, 128, 1000])
@pytest.mark.parametrize("num_buckets", [4, 8, 12, 32, 64])
def test_relative_position_bucket_for_every_distance(num_buckets, max_distance):
    """Every distance up to twice T5's longest sequence."""
    distances = torch.arange(-1100, 1101)
    expected = ReferenceAttention._relative_position_bucket(distances, True, num_buckets, max_distance)
    got = relative_position_bucket(distances, num_buckets, max_distance)
    assert torch.equal(got, expected)
    assert got.min() == 0
    assert got.max() == num_buckets - 1


def no_bias_beyond_the_first_layer(self, input_ids):
    hidden_states = self.embed_tokens(input_ids)
    bias = self.block[0].layer[0].SelfAttention.compute_bias(input_ids.shape[1])
    for index, block in enumerate(self.block):
        hidden_states = block(hidden_states, bias if index == 0 else torch.zeros_like(bias))
    return self.final_layer_norm(hidden_states)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("gelu_new", torch.nn.functional.silu),
        ("relative_position_bucket", lambda distance, buckets, longest: relative_position_bucket(-distance, buckets, longest)),
        ("T5Attend.forward", lambda self, q, k, v, bias: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)),
        ("T5Stack.forward", no_bias_beyond_the_first_layer),
        ("T5LayerNorm.forward", lambda self, x: torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight)),
    ],
    ids=["another activation", "sign of the distance", "scores divided by sqrt(d)", "bias not shared", "mean subtracted"],
)
def test_parity_fails_on_a_planted_bug(monkeypatch, name, bug):
    ours, reference = both(TINY_T5)
    ids = some_ids(TINY_T5)
    assert difference(ours, reference, ids) < 1e-5
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(t5, owner) if owner else t5, attribute, bug)
    assert difference(ours, reference, ids) > 1e-3


def test_bf16_parity_needs_gelu_step_by_step(monkeypatch):
    """The fused tanh GELU is another function in bf16."""
    x = torch.linspace(-6, 6, 4001).bfloat16()
    assert not torch.equal(t5.gelu_new(x), torch.nn.functional.gelu(x, approximate="tanh"))
    assert torch.equal(t5.gelu_new(x), transformers.activations.NewGELUActivation()(x))


def test_the_embedding_is_one_tensor_under_two_keys():
    model = T5EncoderModel(TINY_T5)
    state = model.state_dict()
    assert state["shared.weight"].data_ptr() == state["encoder.embed_tokens.weight"].data_ptr()
    assert "encoder.embed_tokens.weight" not in dict(model.named_parameters())


def test_fp16_loading_keeps_the_modules_that_transformers_keeps():
    assert T5EncoderModel._keep_in_fp32_modules == tuple(transformers.T5EncoderModel._keep_in_fp32_modules)


def test_a_hook_sees_queries_keys_values_bias_and_the_probabilities():
    ours, _ = both(TINY_T5)
    seen = {}

    def look(module, inputs, output):
        queries, keys, values, position_bias = inputs
        seen.update(probabilities=module.probabilities(queries, keys, position_bias), values=values, output=output)

    ours.encoder.block[1].layer[0].SelfAttention.attend.register_forward_hook(look)
    ours(some_ids(TINY_T5))
    assert seen["probabilities"].shape == (3, 3, 19, 19)
    torch.testing.assert_close(seen["probabilities"] @ seen["values"], seen["output"], rtol=1e-5, atol=1e-5)


def test_parameters_of_flux():
    with torch.device("meta"):
        model = T5EncoderModel(FLUX_T5)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_762_310_656


def test_trains():
    model = T5EncoderModel(TINY_T5)
    model(some_ids(TINY_T5)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_from_config_reads_the_upstream_json():
    upstream = transformers.T5Config(d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    assert T5EncoderModel.from_config(upstream.to_dict()).config.d_model == 24
    with pytest.raises(ValueError, match="feed_forward_proj='relu' is not supported"):
        T5EncoderModel.from_config(upstream.to_dict() | {"feed_forward_proj": "relu"})


def test_bad_input():
    with pytest.raises(ShapeError, match=r"T5EncoderModel.forward: argument `input_ids`: expected int \[batch length\], got int64 \[7\]"):
        T5EncoderModel(TINY_T5)(torch.zeros(7, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"relative_position_bucket: argument `relative_position`: .* got float32 \[7\]"):
        relative_position_bucket(torch.zeros(7))
