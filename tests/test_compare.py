"""instruments.compare: equal models agree to the end, and of a planted bug the culprit is named."""

import math

import pytest
import test_autoencoder
import test_clip
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from test_transformer import make_inputs, make_pair
from torch import nn

from flux_lab import blocks, transformer
from flux_lab.attention import Attend, Rope
from flux_lab.blocks import FluxSingleTransformerBlock
from flux_lab.config import TINY, TINY_CLIP, TINY_VAE
from flux_lab.instruments.compare import WHOLE, Copies, first_divergence
from flux_lab.normalization import AdaLayerNormContinuous, AdaLayerNormZero, Modulation, modulate
from flux_lab.rope import FluxPosEmbed

ATTENTION = "transformer_blocks.0.attn"
PRODUCT = f"{ATTENTION}.scaled_dot_product_attention"


# ---- bugs ---------------------------------------------------------------------------------------------------------------


class SwappedChunks(AdaLayerNormZero):
    def forward(self, x, temb):
        normed, gate, mlp = super().forward(x, temb)
        return normed, gate, Modulation(shift=mlp.scale, scale=mlp.shift, gate=mlp.gate)


class SwappedLastChunks(AdaLayerNormContinuous):
    def forward(self, x, conditioning_embedding):
        shift, scale = self.linear(F.silu(conditioning_embedding)).chunk(2, dim=1)
        return modulate(self.norm(x), shift, scale)


class HalvesAsPairs(Rope):
    """Turns (x0, x8), (x1, x9), ... as many language models do, where FLUX turns (x0, x1), (x2, x3), ..."""

    def forward(self, query, key, image_rotary_emb):
        halves = "... (two pairs) -> ... (pairs two)"
        return tuple(
            rearrange(turned, "... (pairs two) -> ... (two pairs)", two=2)
            for turned in super().forward(rearrange(query, halves, two=2), rearrange(key, halves, two=2), image_rotary_emb)
        )


class RepeatedTwice(FluxPosEmbed):
    """Lays the angles side by side twice where each is to stand beside itself."""

    def forward(self, ids):
        return tuple(repeat(wave[:, ::2], "sequence pairs -> sequence (two pairs)", two=2) for wave in super().forward(ids))


class Unscaled(Attend):
    def forward(self, query, key, value):
        return super().forward(query * math.sqrt(query.shape[-1]), key, value)


class WithoutGate(FluxSingleTransformerBlock):
    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb):
        length = encoder_hidden_states.shape[1]
        sequence = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, _ = self.norm(sequence, temb)
        attention = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        sequence = sequence + self.proj_out(torch.cat([attention, self.act_mlp(self.proj_mlp(normed))], dim=2))
        return sequence[:, :length], sequence[:, length:]


def of_class(path, kind):
    def plant(model, monkeypatch):
        model.get_submodule(path).__class__ = kind

    return plant


def missing_bias(path):
    def plant(model, monkeypatch):
        model.get_submodule(path).register_parameter("bias", None)

    return plant


def swapped_modulation(model, monkeypatch):
    monkeypatch.setattr(blocks, "modulate", lambda x, shift, scale: modulate(x, scale, shift))


def unscaled_time(model, monkeypatch):
    monkeypatch.setattr(transformer, "TIME_SCALE", 1)


BUGS = {
    "swapped chunks": (of_class("transformer_blocks.1.norm1_context", SwappedChunks), "transformer_blocks.1.norm1_context", None),
    "swapped last chunks": (of_class("norm_out", SwappedLastChunks), "norm_out", None),
    "missing bias": (missing_bias("single_transformer_blocks.1.attn.to_k"), "single_transformer_blocks.1.attn.to_k", None),
    "missing gate": (of_class("single_transformer_blocks.2", WithoutGate), "single_transformer_blocks.2", None),
    "wrong angles": (of_class("pos_embed", RepeatedTwice), "pos_embed", None),
    "wrong pairs": (of_class(f"{ATTENTION}.rope", HalvesAsPairs), f"{ATTENTION}.rope", PRODUCT),
    "not scaled": (of_class(f"{ATTENTION}.attend", Unscaled), ATTENTION, PRODUCT),
    "in the block itself": (swapped_modulation, "transformer_blocks.0", "transformer_blocks.0.ff.net.0.proj"),
    "in the model itself": (unscaled_time, WHOLE, "time_text_embed.timestep_embedder.linear_1"),
}


@pytest.mark.parametrize(("plant", "culprit", "operation"), BUGS.values(), ids=BUGS)
def test_culprit_is_named(plant, culprit, operation, monkeypatch):
    ours, reference = make_pair(TINY)
    plant(ours, monkeypatch)
    found = first_divergence(ours, reference, make_inputs(TINY))
    assert found
    assert (found.name, found.operation) == (culprit, operation or culprit)
    assert found.largest > 1e-3
    assert hooks_of(ours) == hooks_of(reference) == 0


def hooks_of(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


# ---- what is reported ---------------------------------------------------------------------------------------------------


def test_equal_models_agree_to_the_end():
    ours, reference = make_pair(TINY)
    found = first_divergence(ours, reference, make_inputs(TINY))
    assert not found
    common = dict(ours.named_modules()).keys() & dict(reference.named_modules()).keys()
    # A list of modules is never called itself.
    containers = {name for name in common if nn.ModuleList in (type(model.get_submodule(name)) for model in (ours, reference))}
    products = TINY.num_layers + TINY.num_single_layers
    assert found.matched == len(common - containers) + products
    assert str(found) == f"no difference: all {found.matched} operations agree"


def test_both_values_and_their_place():
    ours, reference = make_pair(TINY)
    with torch.no_grad():
        ours.x_embedder.bias[3] += 0.5
    found = first_divergence(ours, reference, make_inputs(TINY))
    assert (found.matched, found.after) == (0, None)
    assert found.largest == pytest.approx(0.5, abs=1e-5)
    assert found.where[2] == 3
    assert found.ours.value - found.reference.value == pytest.approx(0.5, abs=1e-5)
    assert found.ours.shape == (2, 15, TINY.inner_dim)
    lines = str(found).splitlines()
    assert lines[0] == "first difference: x_embedder"
    assert lines[1].startswith("  largest     0.5 at [")
    assert lines[2].startswith("  ours        float32 [2, 15, 32], mean ")
    assert lines[-1] == "  before it   0 operations agreed"


def test_outputs_of_a_tuple_are_told_apart(monkeypatch):
    ours, reference = make_pair(TINY)
    BUGS["swapped chunks"][0](ours, monkeypatch)
    found = first_divergence(ours, reference, make_inputs(TINY))
    assert (found.output, found.outputs) == (2, 5)
    assert "norm1_context, output 3 of 5\n" in str(found)
    assert found.after == "transformer_blocks.1.norm1_context.norm"


def test_a_difference_seen_later_says_where():
    ours, reference = make_pair(TINY)
    ours.transformer_blocks[0].attn.rope.__class__ = HalvesAsPairs
    text = str(first_divergence(ours, reference, make_inputs(TINY)))
    assert f"first difference: {ATTENTION}.rope\n  seen at     {PRODUCT}, whose inputs differ already" in text


def test_tolerances_nan_and_shapes():
    ours, reference = make_pair(TINY)
    inputs = make_inputs(TINY)
    with torch.no_grad():
        ours.proj_out.bias[0] += 0.01
    assert first_divergence(ours, reference, inputs).name == "proj_out"
    assert not first_divergence(ours, reference, inputs, atol=0.02)
    with torch.no_grad():
        ours.proj_out.bias[0] = float("nan")
    assert first_divergence(ours, reference, inputs, atol=0.02).largest == math.inf
    ours.proj_out = nn.Linear(TINY.inner_dim, 5)
    found = first_divergence(ours, reference, inputs)
    assert (found.name, found.largest, found.where) == ("proj_out", None, None)
    assert (found.ours.shape[-1], found.reference.shape[-1]) == (5, 64)
    assert "largest" not in str(found)


def test_the_text_encoder_and_transformers():
    ours, reference = test_clip.both(TINY_CLIP)
    ids = test_clip.some_ids(TINY_CLIP)
    assert first_divergence(ours, reference, ids).matched > 20
    ours.encoder.layers[1].mlp.fc1.register_parameter("bias", None)
    assert first_divergence(ours, reference, ids).name == "encoder.layers.1.mlp.fc1"


def test_a_model_that_is_not_simply_called():
    ours, reference = test_autoencoder.make_pair(TINY_VAE)
    latents = torch.randn(1, 16, 2, 4)

    def decode(vae, latents):
        return vae.decode(latents)

    assert first_divergence(ours, reference, latents, run=decode).matched > 20
    ours.decoder.up_blocks[1].upsamplers[0].conv.register_parameter("bias", None)
    assert first_divergence(ours, reference, latents, run=decode).name == "decoder.up_blocks.1.upsamplers.0.conv"


class InPlace(nn.Module):
    """Writes into its input, into what a module returned, and between two calls into what the first was given."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x):
        x += 1
        hidden = self.first(x)
        hidden += x
        hidden = self.act(hidden)
        x *= 2
        return self.last(hidden)


def on_both(kind, **different):
    ours, reference = kind(), kind(**different)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


@pytest.mark.parametrize("inference", [False, True])
def test_operations_in_place_make_no_difference(inference):
    ours, reference = on_both(InPlace)
    with torch.inference_mode(inference):
        inputs = torch.randn(3, 4)
        before = inputs.clone()
        assert first_divergence(ours, reference, inputs).matched == 4
    assert torch.equal(inputs, before)
    ours.last.register_parameter("bias", None)
    assert first_divergence(ours, reference, inputs).name == "last"


def test_the_culprit_is_named_by_its_inputs_before_it_wrote_into_them():
    ours, reference = on_both(InPlace)
    ours.act = nn.ReLU6(inplace=True)
    assert first_divergence(ours, reference, torch.full((3, 4), 90.0)).name == "act"


def test_unchanged_tensors_are_copied_once():
    copies, tensor = Copies(), torch.zeros(3)
    first, again = copies.of([tensor, {"same": tensor}])
    tensor += 1
    (changed,) = copies.of(tensor)
    assert first is again
    assert (first.sum(), changed.sum()) == (0, 3)


class Cast(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.cast, self.last, self.dtype = nn.Identity(), nn.Linear(4, 4), dtype

    def forward(self, x):
        return self.last(self.cast(x.to(self.dtype)).float())


@pytest.mark.parametrize(("given", "wanted"), [(torch.float64, torch.float32), (torch.int32, torch.int64), (torch.bfloat16, torch.int64)])
def test_dtypes_may_differ(given, wanted):
    ours, reference = on_both(Cast, dtype=wanted)
    ours.dtype = given
    inputs = torch.arange(12.0).view(3, 4)
    assert first_divergence(ours, reference, inputs).matched == 3
    ours.cast = nn.Threshold(5, 7)
    found = first_divergence(ours, reference, inputs)
    assert (found.name, found.largest, found.where) == ("cast", 7, (0, 0))
    assert (found.ours.dtype, found.reference.dtype) == (given, wanted)


def test_nothing_to_match():
    with pytest.raises(ValueError, match="no module name in common"):
        first_divergence(nn.Linear(2, 2), nn.Linear(2, 2), torch.zeros(2))
