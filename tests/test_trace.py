"""instruments.trace and .seams: the recorded tensors are those that the model computes, and nothing of it stays behind."""

import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize_
from test_transformer import make_inputs
from tiny_parts import make_model, make_pipe

from flux_lab.autoencoder import AutoencoderKL
from flux_lab.clip import CLIPTextModel
from flux_lab.config import TINY, TINY_CLIP, TINY_VAE
from flux_lab.instruments.seams import matcher, place
from flux_lab.instruments.trace import TraceLimitError, trace
from flux_lab.pipeline import FluxPipeline
from flux_lab.transformer import FluxTransformer2DModel

BATCH, LENGTH, TOKENS, HEADS, HEAD_DIM, DIM = 2, 7, 15, 2, 16, 32
RUN = {"prompt": "a red cube", "height": 48, "width": 80, "max_sequence_length": 12, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return make_pipe(tmp_path_factory.mktemp("tiny"))


def seeded():
    return torch.Generator().manual_seed(3)


def hooks_of(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture(scope="module")
def traced(model):
    torch.manual_seed(0)
    inputs = make_inputs(TINY)
    with trace(model, probabilities=True) as t:
        velocity = model(**inputs)
    return t, velocity, inputs


def test_every_tensor_has_its_axes(traced):
    t, *_ = traced
    sizes = {"batch": BATCH, "length": LENGTH, "tokens": TOKENS, "sequence": LENGTH + TOKENS, "heads": HEADS, "head_dim": HEAD_DIM}
    sizes |= {"dim": DIM, "hidden": 4 * DIM, "patch_channels": TINY.in_channels}
    sizes |= {"joint_dim": TINY.joint_attention_dim, "pooled_dim": TINY.pooled_projection_dim}
    assert {name: tuple(tensor.shape) for name, tensor in t.items()} == {name: tuple(sizes[axis] for axis in t.axes[name]) for name in t}
    outside, double, single = 3 + 2 + 4 + 2 + 3 + 1, 2 + 12 + 2 + 2 + 7, 2 + 3 + 2 + 7
    assert len(t) == outside + TINY.num_layers * double + TINY.num_single_layers * single


def test_tensors_are_the_models_own(traced, model):
    t, velocity, inputs = traced
    assert torch.equal(t["velocity"], velocity)
    assert torch.equal(t["conditioning"], (t["conditioning/time"] + t["conditioning/guidance"]) + t["conditioning/pooled"])
    assert torch.equal(t["embedded/image"], model.x_embedder(inputs["hidden_states"]))
    signals = model.transformer_blocks[1].norm1_context.linear(F.silu(t["conditioning"]))
    order = [f"double 01/modulation/text/{layer}/{signal}" for layer in ("attn", "mlp") for signal in ("shift", "scale", "gate")]
    assert torch.equal(torch.cat([t[name] for name in order], dim=1), signals)
    last = model.norm_out.linear(F.silu(t["conditioning"]))
    assert torch.equal(torch.cat([t["modulation/last/scale"], t["modulation/last/shift"]], dim=1), last)


def test_streams_follow_from_what_was_recorded(traced, model):
    """x + gate * attention, then x + gate * MLP, with the signals, inputs and outputs of the trace."""
    t, *_ = traced
    for stream in ("image", "text"):
        gates = [t[f"double 01/modulation/{stream}/{layer}/gate"][:, None] for layer in ("attn", "mlp")]
        expected = t[f"double 00/{stream}"] + gates[0] * t[f"double 01/attn/{stream}"] + gates[1] * t[f"double 01/mlp/{stream}"]
        torch.testing.assert_close(t[f"double 01/{stream}"], expected)
    before, after = (torch.cat([t[f"single {index:02d}/{stream}"] for stream in ("text", "image")], dim=1) for index in (0, 1))
    torch.testing.assert_close(after, before + t["single 01/modulation/gate"][:, None] * t["single 01/update"])


@pytest.mark.parametrize("block", ["double 00", "single 02"])
def test_attention(traced, block):
    t, *_ = traced
    probabilities, values = t[f"{block}/attn/probabilities"], t[f"{block}/attn/v"]
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(BATCH, HEADS, LENGTH + TOKENS))
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", probabilities, values), t[f"{block}/attn/attended"])
    for name in ("q", "k"):
        still, turned = t[f"{block}/attn/{name}"], t[f"{block}/attn/{name}_rope"]
        assert torch.equal(still[:, :LENGTH], turned[:, :LENGTH])
        assert not torch.allclose(still[:, LENGTH + 1 :], turned[:, LENGTH + 1 :])
        torch.testing.assert_close(still.norm(dim=-1), turned.norm(dim=-1))


def test_the_run_is_bit_equal_and_leaves_nothing_behind(pipe):
    without, steps = pipe(**RUN, generator=seeded(), output_type="latent").images, FluxPipeline.steps
    with trace(pipe, only="step 02/*") as t:
        during = pipe(**RUN, generator=seeded(), output_type="latent").images
    assert torch.equal(during, without)
    assert torch.equal(t["step 02/latents"], without)
    assert hooks_of(pipe.transformer) == 0
    assert FluxPipeline.steps is steps
    with contextlib.suppress(KeyboardInterrupt), trace(pipe):
        raise KeyboardInterrupt
    assert hooks_of(pipe.transformer) == 0
    assert FluxPipeline.steps is steps


def test_generations_under_way_at_the_same_time(pipe):
    """Two in the block, one of which goes on after it, beside a third; and a copy of the pipeline, which is not watched."""

    def generation(seed, steps):
        return pipe.steps(**RUN | {"num_inference_steps": steps}, generator=torch.Generator().manual_seed(seed))

    alone = [[state.latents for state in generation(seed, steps)] for seed, steps in ((1, 4), (2, 3))]
    with trace(pipe, only="step ??/latents") as t:
        first, second = generation(1, 4), generation(2, 3)
        together = [(next(first).latents, next(second).latents) for _ in range(2)]
        copy.copy(pipe)(**RUN | {"num_inference_steps": 5}, generator=seeded())
    names = list(t)
    pipe(**RUN, generator=seeded())
    rest = [state.latents for state in first]
    assert all(torch.equal(a, b) for a, b in zip([each[0] for each in together] + rest, alone[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip([each[1] for each in together], alone[1][:2], strict=True))
    assert list(t) == names == ["step 00/latents", "step 01/latents"]
    assert torch.equal(t["step 01/latents"], alone[1][1])


@pytest.mark.parametrize("cfg", [False, True], ids=["one pass", "true CFG"])
def test_steps_are_those_of_the_loop(pipe, cfg):
    more = {"negative_prompt": "a cone", "true_cfg_scale": 2.0} if cfg else {}
    with trace(pipe, only=["step ??/velocity", "*/x0", "*/latents", "*double 01/attn/q"]) as t:
        for _ in range(2):  # A second run is counted anew.
            states = list(pipe.steps(**RUN, **more, generator=seeded()))
    for state in states:
        step = f"step {state.index:02d}"
        for name in ("velocity", "x0", "latents"):
            assert torch.equal(t[f"{step}/{name}"], getattr(state, name))
        assert f"{step}/double 01/attn/q" in t
        assert (f"{step}/negative/double 01/attn/q" in t) == cfg
        assert torch.equal(t["step 01/input/latents"], states[0].latents)
    assert len(t.names("*/attn/q")) == (6 if cfg else 3)
    if cfg:
        assert not torch.equal(t["step 01/negative/double 01/attn/q"], t["step 01/double 01/attn/q"])


def test_only_what_is_asked_for_is_kept(model):
    with trace(model, only="*/gate", dtype=torch.bfloat16) as t:
        model(**make_inputs(TINY))
    assert len(t) == 4 * TINY.num_layers + TINY.num_single_layers
    assert t.bytes == len(t) * BATCH * DIM * 2
    assert {tensor.dtype for tensor in t.values()} == {torch.bfloat16}
    # No view that keeps all six signals alive.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in t.values())


def test_probabilities_only_on_request(model):
    with trace(model) as t:
        model(**make_inputs(TINY))
    with pytest.raises(KeyError, match=r"'double 00/attn/probabilities' was computed but not kept: .*probabilities=True"):
        t["double 00/attn/probabilities"]
    assert t.names("*probabilities") == []


def test_limit_names_the_argument(model):
    with (
        pytest.raises(TraceLimitError, match=r"with 'double 0.*' 0\.0 MiB would be kept, limit=20000 bytes .* only=, e\.g\."),
        trace(model, limit=20_000) as t,
    ):
        model(**make_inputs(TINY))
    assert 0 < t.bytes <= 20_000
    assert hooks_of(model) == 0
    with trace(model, limit=20_000, only="velocity") as t:
        for _ in range(9):
            model(**make_inputs(TINY))
    assert t.bytes == t["velocity"].nbytes


def test_copies_are_independent():
    linear = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with trace(linear) as t:
        linear(torch.randn(2, 3))[:] = 0
    assert t["0"].abs().max() > 0
    assert not t["0"].requires_grad


def test_table(traced):
    t, *_ = traced
    table = t.table(sort="-std", filter="double 0?/image")
    assert list(table.header) == ["name", "axes", "shape", "dtype", "mean", "std"]
    assert {row[0] for row in table.rows} == {"`double 00/image`", "`double 01/image`"}
    assert table.rows[0][-1] > table.rows[1][-1]
    name, axes, shape, dtype, mean, std = table.rows[0]
    tensor = t[name.strip("`")]
    assert (axes, shape, dtype) == ("batch tokens dim", (BATCH, TOKENS, DIM), "float32")
    assert (mean, std) == pytest.approx((tensor.mean().item(), tensor.std(correction=0).item()), rel=1e-3)
    assert [row[0] for row in t.table().rows] == [f"`{name}`" for name in t]
    assert [row[0] for row in t.table(sort="name").rows] == [f"`{name}`" for name in sorted(t)]
    assert "| `double 00/image` | batch tokens dim | [2, 15, 32] |" in table._repr_markdown_()
    assert repr(t).startswith(f"Trace of {len(t)} tensors, ")
    with pytest.raises(ValueError, match=r"sort: expected one of .*, got 'size'"):
        t.table(sort="size")


def test_names_that_are_not_there(traced, model):
    t, *_ = traced
    with pytest.raises(KeyError, match=r"no tensor is named 'double 00/attn/Q'; there is, for example, .*'double 00/attn/q'"):
        t["double 00/attn/Q"]
    with pytest.warns(UserWarning, match=r"only: no tensor of this run is named like 'double 7/\*'"), trace(model, only="double 7/*"):
        model(**make_inputs(TINY))
    with pytest.raises(TypeError, match="target: expected a FluxPipeline or a torch module, got str"), trace("pipe"):
        pass
    with pytest.raises(TypeError, match="expected a pattern"):
        matcher([])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", ""),
        ("transformer_blocks.7.attn", "double 07/attn"),
        ("single_transformer_blocks.30", "single 30"),
        ("down_blocks.0.resnets.1", "down_blocks/0/resnets/1"),
    ],
)
def test_place(path, name):
    assert place(path) == name


def test_one_block_has_the_same_names_without_the_block(traced, model):
    whole, *_ = traced
    block = model.transformer_blocks[1]
    rotation = whole["rope/cos"], whole["rope/sin"]
    with trace(block) as t:
        block(whole["double 00/image"], whole["double 00/text"], whole["conditioning"], rotation)
    assert set(t) == {name.removeprefix("double 01/") for name in whole.names("double 01/*")} - {"attn/probabilities"}
    assert torch.equal(t["attn/q_rope"], whole["double 01/attn/q_rope"])


def test_schnell_has_no_guidance():
    config = dataclasses.replace(TINY, guidance_embeds=False)
    model = randomize_(FluxTransformer2DModel(config))
    with trace(model) as t:
        model(**make_inputs(config))
    assert t.names("conditioning*") == ["conditioning/time", "conditioning/pooled", "conditioning"]


def test_any_other_module_is_seen_part_by_part():
    vae, clip = randomize_(AutoencoderKL(TINY_VAE)), randomize_(CLIPTextModel(TINY_CLIP))
    with trace(vae) as t:
        image = vae.decode(torch.randn(1, 16, 2, 4))
    assert torch.equal(t["decoder"], image)
    assert t["decoder/up_blocks/0"].shape == (1, 32, 4, 8)
    with trace(clip) as t:
        given = clip(torch.tensor([[1, 5, 9]]))
    assert torch.equal(t["pooler_output"], given.pooler_output)
    assert torch.equal(t["encoder/layers/1"], t["encoder"])


@pytest.mark.parametrize(("sort", "order"), [("std", ["0", "2", "1"]), ("-std", ["2", "0", "1"])])
def test_an_empty_tensor_is_sorted_last(sort, order):
    parts = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3)))
    with trace(parts, only=["0", "1", "2"]) as t:
        for part, numbers in zip(parts, ([1.0, 2.0], [], [1.0, 9.0]), strict=True):
            part(torch.tensor(numbers))
    table = t.table(sort=sort)
    assert [row[0] for row in table.rows] == [f"`{name}`" for name in order]
    assert table.rows[-1][-2:] == ["", ""]
