"""flux_lab.inference.fast_text: the same vectors within rounding, from the same weights."""

import pytest
import torch
from conftest import randomize_

from flux_lab.clip import CLIPTextModel
from flux_lab.config import TINY_CLIP, TINY_T5
from flux_lab.inference.fast_text import FastT5Attention, fast_text_encoder
from flux_lab.t5 import T5EncoderModel

MODELS = {"CLIP": (CLIPTextModel, TINY_CLIP), "T5": (T5EncoderModel, TINY_T5)}


def ids(batch=3, length=9):
    return torch.randint(0, 400, (batch, length), generator=torch.Generator().manual_seed(1))


def vectors(model, given):
    found = model(given)
    return found if isinstance(found, torch.Tensor) else torch.cat([found.last_hidden_state, found.pooler_output[:, None]], dim=1)


@pytest.mark.parametrize("kind", MODELS)
def test_equal(kind, dtype):
    build, config = MODELS[kind]
    exact = randomize_(build(config))
    model = randomize_(build(config)).to(dtype)
    faster, given = fast_text_encoder(model), ids()
    if dtype == torch.float32:
        torch.testing.assert_close(vectors(faster, given), vectors(model, given), rtol=1e-5, atol=1e-5)
    else:
        wanted, slow, quick = (vectors(each, given).float() for each in (exact, model, faster))
        assert (quick - wanted).norm() <= 1.3 * (slow - wanted).norm()


def test_t5_with_its_float32_layers():
    """As `from_pretrained` loads it in float16: the last layer of every MLP is in float32, and so is what follows."""
    model = randomize_(T5EncoderModel(TINY_T5)).half()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    faster = fast_text_encoder(model)
    assert faster(ids()).dtype == model(ids()).dtype
    torch.testing.assert_close(faster(ids()), model(ids()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_left_as_it_is(kind):
    build, config = MODELS[kind]
    model = randomize_(build(config))
    before, wanted = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}, vectors(model, ids())
    faster = fast_text_encoder(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert torch.equal(vectors(model, ids()), wanted)
    pointers = {tensor.data_ptr() for tensor in faster.state_dict().values()}
    copied = {name.split(".")[-2] for name, pointer in before.items() if pointer not in pointers}
    assert copied == {"CLIP": {"q_proj", "k_proj", "v_proj"}, "T5": {"q", "k", "v"}}[kind]


def test_the_bias_table_is_made_once_for_a_length():
    model = randomize_(T5EncoderModel(TINY_T5))
    faster = fast_text_encoder(model)
    first = faster.encoder.block[0].layer[0].SelfAttention
    assert isinstance(first, FastT5Attention)
    table = first.compute_bias(9)
    assert first.compute_bias(9) is table
    for length in (4, 9):
        torch.testing.assert_close(faster(ids(length=length)), model(ids(length=length)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_planted_bug_is_noticed(kind):
    build, config = MODELS[kind]
    model = randomize_(build(config))
    faster = fast_text_encoder(model)
    attention = faster.encoder.layers[0].self_attn if kind == "CLIP" else faster.encoder.block[0].layer[0].SelfAttention
    attention.qkv.weight.data = attention.qkv.weight.flip(0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(vectors(faster, ids()), vectors(model, ids()), rtol=1e-5, atol=1e-5)
