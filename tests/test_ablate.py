"""instruments.ablate: what is off is really off, nothing else is, and afterwards everything is back to the last bit."""

import contextlib
import copy

import pytest
import torch
from test_transformer import make_inputs
from tiny_parts import make_model, make_pipe
from torch import nn

from flux_lab.config import TINY
from flux_lab.instruments.ablate import ablate
from flux_lab.instruments.trace import trace

RUN = {"prompt": "a red cube", "height": 32, "width": 48, "max_sequence_length": 12, "num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return make_pipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def inputs():
    return make_inputs(TINY)


def changed(model, change):
    """A copy of the model in which `change` has been done for good."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


def without_blocks(model):
    model.transformer_blocks = nn.ModuleList([model.transformer_blocks[1]])
    model.single_transformer_blocks = nn.ModuleList([model.single_transformer_blocks[0]])


def head_columns(head):
    width = TINY.attention_head_dim
    return slice(head * width, (head + 1) * width)


def without_heads(model):
    attn = model.transformer_blocks[1].attn
    for linear in (attn.to_out[0], attn.to_add_out):
        linear.weight[:, head_columns(0)] = 0
    for block in model.single_transformer_blocks:
        block.proj_out.weight[:, head_columns(1)] = 0


def closed_gates(model):
    dim = TINY.inner_dim
    for parameter in model.transformer_blocks[0].norm1.linear.parameters():
        parameter[5 * dim :] = 0
    for parameter in model.transformer_blocks[1].norm1_context.linear.parameters():
        parameter[2 * dim : 3 * dim] = 0
    for parameter in model.single_transformer_blocks[2].norm.linear.parameters():
        parameter[2 * dim :] = 0


CASES = {
    "blocks": ({"double": 0, "single": range(1, 3)}, without_blocks),
    "heads": ({"heads": {"double 01": 0, "single *": [1]}}, without_heads),
    "gates": (
        {
            "gate": [
                "double 00/modulation/image/mlp/gate",
                "double 01/modulation/text/attn/gate",
                "single 02/modulation/gate",
            ]
        },
        closed_gates,
    ),
}


@pytest.mark.parametrize(("off", "change"), CASES.values(), ids=CASES)
def test_equals_a_model_made_without_it(model, inputs, off, change):
    before = model(**inputs)
    with ablate(model, **off):
        during = model(**inputs)
    torch.testing.assert_close(during, changed(model, change)(**inputs), rtol=0, atol=0)
    assert not torch.allclose(during, before, atol=1e-3)
    assert_restored(model, inputs, before)


def assert_restored(model, inputs, before):
    assert torch.equal(model(**inputs), before)
    assert all(not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part) for part in model.modules())


def test_all_gates_closed_is_all_blocks_gone(model, inputs):
    with ablate(model, double=range(TINY.num_layers), single=range(TINY.num_single_layers)):
        without = model(**inputs)
    with ablate(model, gate="*/gate"):
        closed = model(**inputs)
    assert torch.equal(closed, without)


@pytest.mark.parametrize(("stream", "other"), [("text", "image"), ("image", "text")])
def test_a_held_stream_stays_and_the_other_goes_on(model, inputs, stream, other):
    with ablate(model, stream={"double 01": stream, "single 00": stream}), trace(model, only="*/*") as t:
        model(**inputs)
    assert torch.equal(t[f"double 00/{stream}"], t[f"single 00/{stream}"])
    assert not torch.equal(t[f"single 00/{stream}"], t[f"single 01/{stream}"])
    assert not torch.equal(t[f"double 00/{other}"], t[f"double 01/{other}"])
    with ablate(model, stream=stream), trace(model) as t:
        model(**inputs)
    assert torch.equal(t[f"embedded/{stream}"], t[f"single 02/{stream}"])


def test_no_text(model, inputs):
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("pooled_projections", "encoder_hidden_states")}
    with ablate(model, clip=True):
        assert torch.equal(model(**inputs), model(**inputs | {"pooled_projections": zeros["pooled_projections"]}))
    with ablate(model, t5=True):
        without = model(*inputs.values())
    assert torch.equal(without, model(**inputs | {"encoder_hidden_states": zeros["encoder_hidden_states"]}))


def test_a_trace_that_was_there_first_sees_what_the_model_goes_on_with(model, inputs):
    with trace(model, only=["*/gate", "*/attended"]) as t, ablate(model, gate="*/mlp/gate", heads={"*": 1}):
        model(**inputs)
    assert all((t[name] == 0).all() for name in t.names("*/mlp/gate"))
    assert all((t[name] != 0).any() for name in t.names("*/attn/gate"))
    assert all((t[name][:, :, 1] == 0).all() and (t[name][:, :, 0] != 0).any() for name in t.names("*/attended"))


@pytest.mark.parametrize("negative", [False, True], ids=["one pass", "true CFG"])
def test_the_prompt_is_swapped_from_a_step_on(pipe, negative):
    more = {"negative_prompt": "a cone", "true_cfg_scale": 2.0} if negative else {}
    embeds, pooled, _ = pipe.encode_prompt("a blue sphere", max_sequence_length=12)
    with ablate(pipe, swap_prompt=(1, "a blue sphere")), trace(pipe, only="*/input/*") as t:
        pipe(**RUN, **more, num_images_per_prompt=2)
    for step, is_new in ((0, False), (1, True), (2, True)):
        assert torch.equal(t[f"step {step:02d}/input/prompt_embeds"], embeds.expand(2, -1, -1)) == is_new
        assert torch.equal(t[f"step {step:02d}/input/pooled_prompt_embeds"], pooled.expand(2, -1)) == is_new
        if negative:
            assert torch.equal(t[f"step {step:02d}/negative/input/prompt_embeds"], t["step 00/negative/input/prompt_embeds"])


def test_swapped_from_the_start_is_the_other_prompt(pipe):
    def latents(**arguments):
        return pipe(**RUN | arguments, generator=torch.Generator().manual_seed(3)).images

    before = latents()
    with ablate(pipe, swap_prompt=(0, "a blue sphere")):
        swapped = latents()
    assert torch.equal(swapped, latents(prompt="a blue sphere"))
    assert not torch.equal(swapped, before)
    assert torch.equal(latents(), before)


def test_an_exception_and_a_second_one_inside_restore_too(model, inputs):
    before = model(**inputs)
    off = {"double": [0], "single": 1, "heads": {"*": 0}, "stream": "text", "gate": "*/gate", "clip": True, "t5": True}
    with contextlib.suppress(KeyboardInterrupt), ablate(model, **off):
        with ablate(model, double=[0, 1]):
            model(**inputs)
        with ablate(model, double=0):
            alone = model(**inputs)
        assert torch.equal(model(**inputs), alone)
        raise KeyboardInterrupt
    assert_restored(model, inputs, before)
    with pytest.raises(ValueError, match="gate"), ablate(model, double=0, gate="nowhere"):
        pass
    assert_restored(model, inputs, before)


@pytest.mark.parametrize(
    ("off", "error", "message"),
    [
        ({"double": 2}, ValueError, r"double: there are 2, expected 0 to 1, got 2"),
        ({"single": [0, -1]}, ValueError, r"single: there are 3, expected 0 to 2, got -1"),
        ({"double": ["0"]}, TypeError, r"double: expected whole numbers, got '0'"),
        ({"single": True}, TypeError, r"single: expected whole numbers, got True"),
        ({"heads": {"single 01": 2}}, ValueError, r"heads of 'single 01': there are 2, expected 0 to 1, got 2"),
        ({"heads": {"single 1": 0}}, ValueError, r"heads: no block is named like 'single 1'; the blocks are 'double 00' to 'single 02'"),
        ({"stream": "words"}, ValueError, r"stream: expected 'text' or 'image', got 'words'"),
        ({"stream": {"double 9": "text"}}, ValueError, r"stream: no block is named like 'double 9'"),
        ({"gate": "*/shift"}, ValueError, r"gate: no gate is named like '\*/shift'; gates are 'double 00/modulation/image/attn/gate', ..."),
        ({"swap_prompt": (1, "a cone")}, TypeError, r"swap_prompt: expected a FluxPipeline, .*got FluxTransformer2DModel"),
    ],
)
def test_what_is_not_there(model, off, error, message):
    with pytest.raises(error, match=message), ablate(model, **off):
        pass


def test_other_mistakes(pipe):
    with pytest.raises(TypeError, match="target: expected a FluxPipeline or its transformer, got AutoencoderKL"), ablate(pipe.vae):
        pass
    with pytest.raises(TypeError, match=r"swap_prompt: expected \(step, prompt\)"), ablate(pipe, swap_prompt="a cone"):
        pass
    with pytest.raises(ValueError, match="swap_prompt: steps count from 0, got -1"), ablate(pipe, swap_prompt=(-1, "a cone")):
        pass
