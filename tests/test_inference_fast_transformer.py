"""flux_lab.inference.fast_transformer: one pass equals the reference's, in every dtype and with all 57 blocks."""

import copy

import pytest
import torch
from conftest import randomize_
from test_transformer import CONFIGS, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from flux_lab.config import FLUX_MINI, TINY
from flux_lab.inference.fast_transformer import FastFluxTransformer2DModel, attend, gelu_, modulated_norm, unit_
from flux_lab.transformer import FluxTransformer2DModel


def make_pair(config, dtype=torch.float32):
    model = randomize_(FluxTransformer2DModel(config)).to(dtype)
    return FastFluxTransformer2DModel(model), model


def first_of(inputs):
    """The same inputs for a batch of one."""
    return {name: value if value is None or name.endswith("ids") else value[:1] for name, value in inputs.items()}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal(config, batch):
    faster, model = make_pair(config)
    inputs = make_inputs(config)
    inputs = first_of(inputs) if batch == 1 else inputs
    torch.testing.assert_close(faster(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)


def test_all_57_blocks_in_every_dtype():
    faster, model = make_pair(FLUX_MINI)
    inputs = make_inputs(FLUX_MINI)
    exact = model(**inputs)
    torch.testing.assert_close(faster(**inputs), exact, rtol=1e-4, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: value.to(dtype) if name != "guidance" else value for name, value in inputs.items()}
        quick, slow = (each(**half).float() for each in make_pair(FLUX_MINI, dtype))
        assert (quick - exact).norm() <= 1.2 * (slow - exact).norm()


def test_steps_prepared_at_once_are_those_of_single_passes():
    faster, model = make_pair(TINY)
    inputs = make_inputs(TINY)
    times = torch.tensor([[1.0, 1.0], [0.6, 0.4], [0.2, 0.1]])
    shared = {name: value for name, value in inputs.items() if name not in ("hidden_states", "timestep")}
    prepared = faster.prepare(timesteps=times, **shared)
    for index, timestep in enumerate(times):
        wanted = model(**inputs | {"timestep": timestep})
        torch.testing.assert_close(faster.step(inputs["hidden_states"], prepared, index), wanted, rtol=1e-5, atol=1e-5)
    signals = 12 * TINY.num_layers + 3 * TINY.num_single_layers + 2
    assert prepared.modulation.shape == (3, 2, 1, signals, TINY.inner_dim)


def test_a_velocity_is_a_plain_tensor():
    """Computed in inference mode, and yet it can be written to and learned from."""
    faster, _ = make_pair(TINY)
    velocity = faster(**make_inputs(TINY)).mul_(2)
    assert not velocity.is_inference()
    weight = torch.ones((), requires_grad=True)
    (velocity * weight).sum().backward()
    assert weight.grad == velocity.sum()


def test_inputs_are_left_as_they_are():
    faster, _ = make_pair(TINY)
    inputs = make_inputs(TINY)
    before = {name: value.clone() for name, value in inputs.items()}
    assert torch.equal(faster(**inputs), faster(**inputs))
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())


def test_few_products():
    """Four matrix products a stream of a double-stream block, two in a single-stream block, one each for the first and the last layer."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **kwargs or {})

    faster, _ = make_pair(TINY)
    inputs = first_of(make_inputs(TINY))
    shared = {name: value for name, value in inputs.items() if name not in ("hidden_states", "timestep")}
    prepared, called = faster.prepare(timesteps=inputs["timestep"][None], **shared), []
    with Count(), torch.no_grad():
        faster.step(inputs["hidden_states"], prepared, 0)
    products = sum("aten.addmm" in name or "aten.linear" in name for name in called)
    # Each stream: queries, keys and values; output; two of the MLP. Then the single-stream blocks; then the first and the last layer.
    assert products == 8 * TINY.num_layers + 2 * TINY.num_single_layers + 2


@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_norm(batch):
    x, (shift, scale) = torch.randn(batch, 5, 8), torch.randn(2, 8) if batch == 1 else torch.randn(2, batch, 1, 8)
    wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() * scale + shift
    torch.testing.assert_close(modulated_norm(x, shift, scale), wanted)


def test_unit():
    norm, qk = torch.nn.RMSNorm(8, eps=1e-6), torch.randn(2, 5, 2, 3, 8) * torch.tensor([1.0, 1e-3]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(unit_(qk.clone(), torch.tensor((8 * 1e-6) ** 0.5)) * 8**0.5, norm(qk))


def test_both_forms_of_the_rotation(monkeypatch):
    qkv, angles = torch.randn(2, 5, 3, 2, 6), torch.randn(5, 1, 1, 3)
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    qk, value = qkv[:, :, :2], qkv[:, :, 2]
    wanted = attend(qk, value, rotation)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(attend(qk, value, rotation), wanted)


def test_both_forms_of_gelu(monkeypatch):
    x = torch.linspace(-12, 12, 241).view(1, 241)[:, 1:]
    wanted = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(gelu_(x.clone()), wanted)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gelu_(x.clone()), wanted)


@pytest.mark.parametrize("name", ["qkv", "norm", "gate"])
def test_a_planted_bug_is_noticed(name):
    faster, model = make_pair(TINY)
    text = faster.blocks[0].text
    if name == "qkv":
        text.qkv.weight.data = text.qkv.weight.roll(TINY.inner_dim, 0)
    if name == "norm":
        text.norm.data = text.norm.flip(0)
    if name == "gate":
        single = 2 * TINY.num_layers
        faster.modulations[single] = copy.deepcopy(faster.modulations[single])  # it shares the model's
        faster.modulations[single].bias.data[-1] += 0.1
    inputs = make_inputs(TINY)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(faster(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
