"""flux_lab.image_processor gives the bytes of diffusers' VaeImageProcessor."""

import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor as ReferenceProcessor
from PIL import Image

from flux_lab import image_processor
from flux_lab.image_processor import VaeImageProcessor
from flux_lab.shapes import ShapeError

SIZES = [(16, 32), (37, 50), (33, 16), (131, 67)]
TARGETS = [(None, None), (64, 48), (70, None), (None, 33), (16, 16)]
CHANNELS = {"RGB": 3, "RGBA": 4, "L": 1}


def random_array(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).random(shape).astype(dtype)


def random_pil(mode, height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, CHANNELS[mode]), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels)


def assert_same_tensor(image, height=None, width=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = ReferenceProcessor(**options).preprocess(image, height=height, width=width)
    given = VaeImageProcessor(**options).preprocess(image, height=height, width=width)
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    return given


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", CHANNELS)
def test_preprocess_pil(mode, size, target):
    for factor in (8, 16):
        result = assert_same_tensor(random_pil(mode, *size), *target, vae_scale_factor=factor)
        assert result.shape[1] == CHANNELS[mode]
        assert result.shape[2] % factor == result.shape[3] % factor == 0
    assert_same_tensor(random_pil(mode, *size), *target, do_convert_rgb=True)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocess_arrays_and_tensors(size, target):
    for array in (random_array(*size), random_array(*size, 3), random_array(2, *size, 3), random_array(*size, 3, dtype=np.float64)):
        assert_same_tensor(array, *target)
        assert_same_tensor([array, array * 0.5], *target)
    for tensor in (torch.rand(3, *size), torch.rand(2, 3, *size), torch.rand(2, 3, *size).bfloat16(), torch.rand(2, 1, *size).half()):
        assert_same_tensor(tensor, *target)
        assert_same_tensor([tensor, tensor * 0.5], *target)


def test_preprocess_lists_take_the_size_of_the_first():
    images = [random_pil("RGB", *size) for size in SIZES]
    assert assert_same_tensor(images).shape == (4, 3, 16, 32)


@pytest.mark.parametrize("kind", ["pil", "array", "tensor", "negative tensor"])
def test_preprocess_the_worked_case_of_sd15(kind):
    """SD 1.5 needs multiples of 8: 1611 = 201 * 8 + 3 becomes 1608. The picture is resized, not cropped."""
    height, width = 1032, 1611
    picture = random_pil("RGB", height, width)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    images = {"pil": picture, "array": tensor.permute(1, 2, 0).numpy(), "tensor": tensor, "negative tensor": 2 * tensor - 1}
    result = assert_same_tensor(images[kind], vae_scale_factor=8)
    assert result.shape == (1, 3, 1032, 1608)
    assert -1 <= result.min() < -0.9
    assert 0.9 < result.max() <= 1
    assert not torch.equal(result[0], 2 * tensor[:, :, :1608] - 1)
    assert assert_same_tensor(images[kind], vae_scale_factor=16).shape == (1, 3, 1024, 1600)
    assert assert_same_tensor(images[kind], 100, 50).shape == (1, 3, 96, 48)


def test_preprocess_leaves_negative_numbers_alone():
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    assert torch.equal(assert_same_tensor(image), image)
    assert torch.equal(assert_same_tensor(image.abs(), do_normalize=False), image.abs())


def test_preprocess_leaves_latents_alone():
    latents = torch.rand(1, 16, 5, 7)
    assert torch.equal(assert_same_tensor(latents, vae_latent_channels=16), latents)


def test_preprocess_does_not_resize_when_told():
    assert assert_same_tensor(random_pil("RGB", 9, 13), do_resize=False).shape == (1, 3, 9, 13)
    assert assert_same_tensor(torch.rand(1, 3, 9, 13), do_resize=False).shape == (1, 3, 9, 13)


def test_preprocess_any_size():
    for height, width, new_height, new_width in np.random.default_rng(0).integers(8, 91, (40, 4)).tolist():
        assert_same_tensor(random_pil("RGB", height, width), new_height, new_width)
        assert_same_tensor(torch.rand(1, 3, height, width), new_height, new_width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_postprocess(channels, dtype):
    image = (torch.randn(2, channels, 17, 23) * 0.8).to(dtype)
    ours, reference = VaeImageProcessor(), ReferenceProcessor()
    for kind in ("pt", "np", "latent"):
        expected = reference.postprocess(image, output_type=kind)
        assert type(ours.postprocess(image, output_type=kind)) is type(expected)
        assert np.array_equal(np.asarray(ours.postprocess(image, kind).tolist()), np.asarray(expected.tolist()))
    for given_image, expected in zip(ours.postprocess(image), reference.postprocess(image), strict=True):
        assert given_image.mode == expected.mode
        assert given_image.tobytes() == expected.tobytes()


def test_postprocess_rounds_halves_to_even():
    """The values that land exactly between two bytes, and all the others near them."""
    halves = (torch.arange(255, dtype=torch.float64) + 0.5) / 255 * 2 - 1
    image = torch.cat([halves.float().nextafter(torch.tensor(bound)) for bound in (-2.0, 2.0)] + [halves.float()])[None, None, None]
    (given_image,), (expected,) = VaeImageProcessor().postprocess(image), ReferenceProcessor().postprocess(image)
    assert given_image.tobytes() == expected.tobytes()
    assert image_processor.array_to_pil(np.array([[[[0.5 / 255]]], [[[1.5 / 255]]], [[[2.5 / 255]]]]))[2].tobytes() == bytes([2])


def test_pictures_survive_the_round_trip():
    image = random_pil("RGB", 24, 32)
    (back,) = VaeImageProcessor().postprocess(VaeImageProcessor().preprocess(image))
    assert back.tobytes() == image.tobytes()


def test_from_config():
    reference = ReferenceProcessor(vae_scale_factor=16, vae_latent_channels=16, do_convert_rgb=True)
    assert VaeImageProcessor.from_config(dict(reference.config)) == VaeImageProcessor(
        vae_scale_factor=16, vae_latent_channels=16, do_convert_rgb=True
    )
    with pytest.raises(ValueError, match="resample='bilinear' is not supported"):
        VaeImageProcessor.from_config({"resample": "bilinear"})


BAD = {
    "nothing": ([], TypeError, r"argument `image`: expected PIL images, arrays or tensors.* got \[\]"),
    "a path": ("cat.png", TypeError, r"got \['str'\]"),
    "two kinds": ([random_array(8, 8, 3), torch.rand(3, 8, 8)], TypeError, r"got \['ndarray', 'Tensor'\]"),
    "palette": (Image.new("P", (16, 16)), ValueError, "mode 'P'"),
    "two modes": ([Image.new("L", (16, 16)), Image.new("RGB", (16, 16))], ValueError, "mode 'RGB', expected .* the same for all"),
    "bytes": (np.zeros((16, 16, 3), np.uint8), ValueError, "expected floats in .0, 1., got uint8"),
    "integers": (torch.zeros(1, 3, 16, 16, dtype=torch.int64), ValueError, "expected floats in .0, 1., got torch.int64"),
    "two axes": (torch.rand(16, 16), ShapeError, r"expected \[channels height width\].* got \[16, 16\]"),
    "five axes": (np.zeros((1, 1, 16, 16, 3)), ShapeError, r"got \[1, 1, 16, 16, 3\]"),
    "two sizes": ([torch.rand(3, 16, 16), torch.rand(3, 16, 24)], ShapeError, r"got \[3, 16, 24\] next to \[3, 16, 16\]"),
    "too small": (Image.new("RGB", (7, 9)), ValueError, "height=9, width=7: expected at least vae_scale_factor=8"),
}


@pytest.mark.parametrize(("image", "error", "message"), BAD.values(), ids=BAD)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        VaeImageProcessor().preprocess(image)


def test_bad_output():
    with pytest.raises(ValueError, match="output_type='jpeg', expected one of"):
        VaeImageProcessor().postprocess(torch.rand(1, 3, 8, 8), "jpeg")
    with pytest.raises(
        ShapeError, match=r"postprocess: argument `image`: expected float \[batch channels height width\], got float32 \[3, 8, 8\]"
    ):
        VaeImageProcessor().postprocess(torch.rand(3, 8, 8))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("stack_arrays", lambda images: torch.from_numpy(np.stack(images)).transpose(1, -1)),
        ("stack_tensors", lambda images: torch.stack(images).flip(-1)),
    ],
)
def test_planted_bug_in_preprocess_is_found(monkeypatch, name, wrong):
    monkeypatch.setattr(image_processor, name, wrong)
    with pytest.raises(AssertionError):
        assert_same_tensor(random_array(16, 24, 3) if name == "stack_arrays" else torch.rand(3, 16, 24))


def test_planted_bug_in_postprocess_is_found(monkeypatch):
    """Truncation, the usual mistake, instead of rounding."""
    monkeypatch.setattr(image_processor, "array_to_pil", lambda array: [Image.fromarray((one * 255).astype(np.uint8)) for one in array])
    with pytest.raises(AssertionError):
        test_postprocess(3, torch.float32)
