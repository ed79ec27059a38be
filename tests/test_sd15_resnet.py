"""flux_lab.sd15.resnet equals diffusers' ResnetBlock2D with time, Downsample2D and Upsample2D."""

import pytest
import torch
from conftest import assert_parity, copy_weights, randomize_
from diffusers.models.downsampling import Downsample2D as ReferenceDownsample
from diffusers.models.resnet import ResnetBlock2D as ReferenceResnet
from diffusers.models.upsampling import Upsample2D as ReferenceUpsample
from sd15_parts import assert_same_gradients

from flux_lab.sd15.config import TINY_UNET
from flux_lab.sd15.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from flux_lab.shapes import ShapeError

TIME_DIM = TINY_UNET.time_embed_dim
SIZES = [(8, 12), (7, 5), (1, 4)]


def make_resnets(in_channels, out_channels, dtype=torch.float32):
    reference = ReferenceResnet(in_channels=in_channels, out_channels=out_channels, temb_channels=TIME_DIM, groups=4, eps=1e-5)
    reference = randomize_(reference).to(dtype)
    return copy_weights(ResnetBlock2D(TINY_UNET, in_channels, out_channels), reference), reference


@pytest.mark.parametrize(("in_channels", "out_channels"), [(8, 8), (8, 16), (24, 12)])
def test_resnet(in_channels, out_channels, dtype):
    ours, reference = make_resnets(in_channels, out_channels, dtype)
    inputs = torch.randn(2, in_channels, 7, 5).to(dtype), torch.randn(2, TIME_DIM).to(dtype)
    assert_parity(ours(*inputs), reference(*inputs))


def test_gradients_of_the_resnet():
    inputs = torch.randn(2, 8, 7, 5), torch.randn(2, TIME_DIM)
    assert_same_gradients(*make_resnets(8, 12), call=lambda module: [module(*inputs)])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_downsample(size, dtype):
    reference = randomize_(ReferenceDownsample(6, use_conv=True, padding=1, name="op")).to(dtype)
    ours = copy_weights(Downsample2D(6), reference)
    x = torch.randn(2, 6, *size).to(dtype)
    assert_parity(ours(x), reference(x))


@pytest.mark.parametrize("trim", [(0, 0), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_upsample(size, trim, dtype):
    reference = randomize_(ReferenceUpsample(6, use_conv=True)).to(dtype)
    ours = copy_weights(Upsample2D(6), reference)
    x = torch.randn(2, 6, *size).to(dtype)
    wanted = tuple(2 * side - less for side, less in zip(size, trim, strict=True))
    # Upstream is told a size only when it is not just twice as large.
    told = wanted if any(trim) else None
    assert_parity(ours(x, wanted), reference(x, told))
    assert torch.equal(ours(x, told), ours(x, wanted))


def test_wrong_shapes():
    ours, _ = make_resnets(8, 16)
    with pytest.raises(
        ShapeError, match=r"ResnetBlock2D.forward: argument `temb`: expected float \[batch=2 time_dim\], got float32 \[3, 32\]"
    ):
        ours(torch.ones(2, 8, 4, 5), torch.ones(3, 32))
    with pytest.raises(ShapeError, match=r"ResnetBlock2D.forward: argument `input_tensor`: .* got float32 \[8, 4, 5\]"):
        ours(torch.ones(8, 4, 5), torch.ones(1, 32))
    with pytest.raises(ShapeError, match=r"Downsample2D.forward: argument `hidden_states`: .* got float32 \[6, 4, 5\]"):
        Downsample2D(6)(torch.ones(6, 4, 5))
    with pytest.raises(ShapeError, match=r"Upsample2D.forward: argument `hidden_states`: .* got float32 \[6, 4, 5\]"):
        Upsample2D(6)(torch.ones(6, 4, 5), (8, 10))


def test_planted_bug_in_the_time_is_found():
    """SiLU taken of the time twice."""
    ours, reference = make_resnets(8, 16)
    x, temb = torch.randn(2, 8, 7, 5), torch.randn(2, TIME_DIM)
    with pytest.raises(AssertionError):
        assert_parity(ours(x, torch.nn.functional.silu(temb)), reference(x, temb))


def test_planted_bug_in_the_padding_is_found(monkeypatch):
    pad = torch.nn.functional.pad
    monkeypatch.setattr(
        Downsample2D,
        "forward",
        lambda self, x: torch.nn.functional.conv2d(pad(x, (0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2),
    )
    with pytest.raises(AssertionError):
        test_downsample((8, 12), torch.float32)
