"""flux_lab.blocks equals diffusers' two kinds of block, gradients too."""

import pytest
import torch
from conftest import assert_parity, copy_weights, randomize_
from diffusers.models.attention import FeedForward as ReferenceFeedForward
from diffusers.models.transformers import transformer_flux as reference_flux

from flux_lab.blocks import GELU, FeedForward, FluxSingleTransformerBlock, FluxTransformerBlock
from flux_lab.rope import FluxPosEmbed
from flux_lab.shapes import ShapeError

DIM, HEADS, HEAD_DIM = 24, 3, 8
KINDS = {"double": FluxTransformerBlock, "single": FluxSingleTransformerBlock}


def make_pair(kind, dtype=torch.float32):
    sizes = {"dim": DIM, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
    reference = randomize_(getattr(reference_flux, kind.__name__)(**sizes)).to(dtype)
    return copy_weights(kind(**sizes), reference), reference


def make_inputs(dtype=torch.float32):
    return {
        "hidden_states": torch.randn(2, 11, DIM).to(dtype),
        "encoder_hidden_states": torch.randn(2, 5, DIM).to(dtype),
        "temb": torch.randn(2, DIM).to(dtype),
        "image_rotary_emb": FluxPosEmbed(10000.0, (2, 2, 4))(torch.randint(0, 9, (16, 3)).float()),
    }


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_parity(kind, dtype):
    ours, reference = make_pair(kind, dtype)
    inputs = make_inputs(dtype)
    for given, wanted in zip(ours(**inputs), reference(**inputs), strict=True):
        assert_parity(given, wanted)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradients(kind):
    models = [model.requires_grad_(True) for model in make_pair(kind)]
    inputs = make_inputs()
    for model in models:
        text, image = model(**inputs)
        (text.square().mean() + image.square().mean()).backward()
    ours, reference = (dict(model.named_parameters()) for model in models)
    largest = max(parameter.grad.abs().max() for parameter in reference.values())
    for name, parameter in reference.items():
        assert (ours[name].grad - parameter.grad).abs().max() <= 1e-4 * largest, name


def test_feed_forward(dtype):
    reference = randomize_(ReferenceFeedForward(DIM, activation_fn="gelu-approximate")).to(dtype)
    ours = copy_weights(FeedForward(DIM), reference)
    x = torch.randn(2, 5, DIM).to(dtype)
    assert_parity(ours(x), reference(x))
    assert_parity(ours.net[0](x), reference.net[0](x))


def plant_exact_gelu(block):
    if isinstance(block, FluxSingleTransformerBlock):
        block.act_mlp = torch.nn.GELU()
    else:
        block.ff.net[0].forward = lambda x: torch.nn.functional.gelu(block.ff.net[0].proj(x))


def plant_swapped_chunks(block):
    linear = block.norm.linear if isinstance(block, FluxSingleTransformerBlock) else block.norm1.linear
    linear.weight.copy_(linear.weight.roll(DIM, dims=0))


def plant_missing_bias(block):
    linear = block.proj_out if isinstance(block, FluxSingleTransformerBlock) else block.ff_context.net[2]
    linear.bias.zero_()


@pytest.mark.parametrize("plant", [plant_exact_gelu, plant_swapped_chunks, plant_missing_bias])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_planted_bug_is_noticed(kind, plant):
    ours, reference = make_pair(kind)
    plant(ours)
    inputs = make_inputs()
    pairs = list(zip(ours(**inputs), reference(**inputs), strict=True))
    assert not all(torch.allclose(given, wanted, rtol=1e-5, atol=1e-5) for given, wanted in pairs)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_float16_is_clipped_where_upstream_clips(kind):
    ours, reference = make_pair(kind, torch.float16)
    inputs = make_inputs(torch.float16)
    inputs["encoder_hidden_states"] = torch.full_like(inputs["encoder_hidden_states"], 65504.0)
    for model in (ours, reference):
        linear = model.proj_out if isinstance(ours, FluxSingleTransformerBlock) else model.ff_context.net[2]
        linear.bias.fill_(3e4)
    text, image = ours(**inputs)
    wanted_text, wanted_image = reference(**inputs)
    assert torch.equal(text, wanted_text)
    assert torch.equal(image, wanted_image)
    assert text.isfinite().all()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_clear_error(kind):
    ours, _ = make_pair(kind)
    with pytest.raises(
        ShapeError, match=rf"{kind.__name__}.forward: argument `temb`: expected float \[batch=2 dim={DIM}\], got float32 \[2, 25\]"
    ):
        ours(**make_inputs() | {"temb": torch.zeros(2, 25)})


def test_gelu_names_its_linear_as_upstream():
    assert list(GELU(3, 4).state_dict()) == ["proj.weight", "proj.bias"]
