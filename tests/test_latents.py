"""flux_lab.latents equals diffusers' FluxPipeline, and packing and unpacking are inverses."""

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange

from flux_lab.latents import pack_latents, prepare_latent_image_ids, prepare_noise, unpack_latents
from flux_lab.shapes import ShapeError

SIZES = [(2, 16, 6, 10), (3, 4, 2, 8), (1, 5, 12, 4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pack_and_unpack(size, dtype):
    latents = torch.randn(size).to(dtype)
    batch, channels, height, width = size
    tokens = pack_latents(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, batch, channels, height, width))
    pixels = {"height": height * 8, "width": width * 8}
    unpacked = unpack_latents(tokens, **pixels)
    assert torch.equal(unpacked, FluxPipeline._unpack_latents(tokens, **pixels, vae_scale_factor=8))
    assert torch.equal(unpacked, latents)


def test_another_scale_factor():
    latents = torch.randn(1, 16, 4, 6)
    assert torch.equal(unpack_latents(pack_latents(latents), height=16, width=24, vae_scale_factor=4), latents)


@pytest.mark.parametrize("order", ["(p_row p_column channels)", "(channels p_column p_row)"])
def test_another_order_inside_a_token_is_noticed(order):
    latents = torch.randn(SIZES[0])
    wrong = rearrange(latents, f"batch channels (rows p_row) (columns p_column) -> batch (rows columns) {order}", p_row=2, p_column=2)
    assert not torch.equal(wrong, pack_latents(latents))


def test_image_ids(dtype):
    ids = prepare_latent_image_ids(3, 5, dtype=dtype)
    assert torch.equal(ids, FluxPipeline._prepare_latent_image_ids(None, 3, 5, "cpu", dtype))
    assert ids[5 + 2].tolist() == [0, 1, 2]


def test_in_bfloat16_ids_above_256_are_rounded():
    assert prepare_latent_image_ids(258, 1, dtype=torch.bfloat16)[257].tolist() == [0, 256, 0]


@pytest.mark.parametrize("many", [False, True])
def test_noise(many, dtype):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)] if many else torch.Generator().manual_seed(1)

    shape = (3, 16, 4, 6)
    assert torch.equal(prepare_noise(shape, generators(), dtype), randn_tensor(shape, generators(), dtype=dtype))


def test_clear_errors():
    with pytest.raises(ValueError, match="height and width of the latents must be even, got 3 x 4"):
        pack_latents(torch.zeros(1, 16, 3, 4))
    with pytest.raises(ValueError, match="an image of 64 x 64 pixels has 4 x 4 = 16 tokens, got 15"):
        unpack_latents(torch.zeros(1, 15, 64), height=64, width=64)
    with pytest.raises(ValueError, match="a list of 2 generators for a batch of 3"):
        prepare_noise((3, 16, 2, 2), [torch.Generator(), torch.Generator()])
    with pytest.raises(
        ShapeError, match=r"pack_latents: argument `latents`: expected float \[batch channels height width\], got float32 \[16, 4, 4\]"
    ):
        pack_latents(torch.zeros(16, 4, 4))
