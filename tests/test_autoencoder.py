"""flux_lab.autoencoder equals diffusers' AutoencoderKL."""

import dataclasses

import pytest
import torch
from conftest import randomize_
from diffusers import AutoencoderKL as ReferenceAutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as ReferenceDistribution

from flux_lab import autoencoder
from flux_lab.autoencoder import AutoencoderKL, DiagonalGaussianDistribution
from flux_lab.config import FLUX_VAE, MINI_VAE, TINY_VAE
from flux_lab.shapes import ShapeError

LIKE_FLUX = TINY_VAE
LIKE_SD15 = dataclasses.replace(
    TINY_VAE,
    latent_channels=4,
    scaling_factor=0.18215,
    shift_factor=None,
    use_quant_conv=True,
    use_post_quant_conv=True,
    layers_per_block=2,
)
SHALLOW = dataclasses.replace(
    TINY_VAE,
    in_channels=2,
    out_channels=5,
    block_out_channels=(6, 12),
    norm_num_groups=3,
    latent_channels=7,
    sample_size=16,
    use_quant_conv=True,
)
CONFIGS = {"like_flux": LIKE_FLUX, "like_sd15": LIKE_SD15, "shallow": SHALLOW}
SIZES = [(16, 24), (37, 26)]


def reference_of(config, seed=0):
    return randomize_(ReferenceAutoencoderKL.from_config(config.to_dict()), seed)


def ours_of(config, reference):
    ours = AutoencoderKL.from_config(dict(reference.config)).requires_grad_(False)
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert ours.config == config
    return ours.to(reference.dtype)


def make_pair(config, dtype=torch.float32):
    reference = reference_of(config).to(dtype)
    return ours_of(config, reference), reference


def images_for(config, size=(16, 24), batch=2, dtype=torch.float32):
    return torch.randn(batch, config.in_channels, *size).clamp(-1, 1).to(dtype)


def assert_same_both_ways(ours, reference, images, **tolerance):
    expected = reference.encode(images).latent_dist
    given = ours.encode(images)
    for field in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(given, field), getattr(expected, field), **tolerance)
    torch.testing.assert_close(ours.decode(expected.mean), reference.decode(expected.mean).sample, **tolerance)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32(config, size):
    ours, reference = make_pair(config)
    assert_same_both_ways(ours, reference, images_for(config, size), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_half_precision_is_bit_equal(config, dtype):
    ours, reference = make_pair(config, dtype)
    assert_same_both_ways(ours, reference, images_for(config, dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients(config):
    """Gradients of encode, sample and decode together, for the images and for every parameter."""
    ours, reference = make_pair(config)
    gradients = []
    for model in (ours, reference):
        model.requires_grad_(True)
        images = images_for(config).fill_(0.3).requires_grad_(True)
        generator = torch.Generator().manual_seed(1)
        output = model(images, sample_posterior=True, generator=generator)
        output = output if isinstance(output, torch.Tensor) else output.sample
        output.square().mean().backward()
        gradients.append({"images": images.grad} | {name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max() for gradient in gradients[1].values())
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-4 * float(largest), msg=name)


@pytest.mark.parametrize("size", [(40, 56), (33, 70), (104, 40)], ids=str)
@pytest.mark.parametrize("config", [LIKE_SD15, SHALLOW], ids=["like_sd15", "shallow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiling(config, size, dtype):
    ours, reference = make_pair(dataclasses.replace(config, sample_size=32), dtype)
    plain = ours.encode(images_for(config, size, dtype=dtype))
    ours.enable_tiling()
    reference.enable_tiling()
    images = images_for(config, size, dtype=dtype)
    assert_same_both_ways(ours, reference, images, rtol=0 if dtype == torch.bfloat16 else 1e-5, atol=0 if dtype == torch.bfloat16 else 1e-5)
    assert not torch.equal(plain.mean, ours.encode(images).mean)
    ours.enable_tiling(False)
    reference.disable_tiling()
    assert_same_both_ways(ours, reference, images, rtol=1e-5, atol=1e-5)


def test_slicing():
    ours, reference = make_pair(LIKE_FLUX)
    images = images_for(LIKE_FLUX, batch=3)
    plain = ours.decode(ours.encode(images).mode())
    ours.enable_slicing()
    reference.enable_slicing()
    calls = []
    ours.encoder.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    assert_same_both_ways(ours, reference, images, rtol=1e-5, atol=1e-5)
    assert calls == [1, 1, 1]
    torch.testing.assert_close(ours.decode(ours.encode(images).mode()), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_distribution_is_bit_equal(dtype):
    """Moments far outside the clamp too."""
    moments = (torch.randn(2, 10, 4, 6) * 20).to(dtype)
    given, expected = DiagonalGaussianDistribution(moments), ReferenceDistribution(moments)
    assert expected.logvar.min() == -30
    assert expected.logvar.max() == 20
    for field in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(given, field), getattr(expected, field)), field
    assert torch.equal(given.kl(), expected.kl())
    assert torch.equal(given.mode(), expected.mode())
    for seeds in (1, [2, 3]):
        draws = []
        for posterior in (given, expected):
            generators = [torch.Generator().manual_seed(seed) for seed in (seeds if isinstance(seeds, list) else [seeds])]
            draws.append(posterior.sample(generators if isinstance(seeds, list) else generators[0]))
        assert torch.equal(*draws)


def test_sizes_of_flux():
    with torch.device("meta"):
        model = AutoencoderKL(FLUX_VAE)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_819_683
    assert len(model.state_dict()) == 244


@pytest.mark.parametrize("config", [FLUX_VAE, MINI_VAE], ids=["flux", "mini"])
def test_parameter_names_and_shapes(config):
    with torch.device("meta"):
        ours, reference = AutoencoderKL(config), ReferenceAutoencoderKL.from_config(config.to_dict())
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in reference.state_dict().items()
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda vae: vae.encode(torch.ones(1, 4, 16, 16)),
            r"AutoencoderKL.encode: argument `images`: expected 3 channels .* \[1, 4, 16, 16\]",
        ),
        (
            lambda vae: vae.encode(torch.ones(1, 3, 7, 16)),
            r"argument `images`: expected 3 channels of at least 8x8, got float32 \[1, 3, 7, 16\]",
        ),
        (
            lambda vae: vae.encode(torch.ones(3, 16, 16)),
            r"AutoencoderKL.encode: argument `images`: expected float \[batch .* \[3, 16, 16\]",
        ),
        (lambda vae: vae.encode(torch.ones(1, 3, 16, 16, dtype=torch.uint8)), r"argument `images`: expected float .* got uint8"),
        (
            lambda vae: vae.decode(torch.ones(1, 4, 2, 2)),
            r"AutoencoderKL.decode: argument `latents`: expected 16 channels .* \[1, 4, 2, 2\]",
        ),
        (
            lambda vae: vae.decode(torch.ones(16, 2, 2)),
            r"AutoencoderKL.decode: argument `latents`: expected float \[.* got float32 \[16, 2, 2\]",
        ),
        (
            lambda vae: vae(torch.ones(3, 16, 16)),
            r"AutoencoderKL.forward: argument `sample`: expected float \[.* got float32 \[3, 16, 16\]",
        ),
        (lambda vae: vae.encoder(torch.ones(3, 16, 16)), r"Encoder.forward: argument `sample`.* got float32 \[3, 16, 16\]"),
        (lambda vae: vae.decoder(torch.ones(16, 2, 2)), r"Decoder.forward: argument `sample`.* got float32 \[16, 2, 2\]"),
        (
            lambda vae: DiagonalGaussianDistribution(torch.ones(2, 3)),
            r"DiagonalGaussianDistribution.__init__: argument `parameters`.* \[2, 3\]",
        ),
        (lambda vae: autoencoder.run_tiled(vae.encoder, torch.ones(3, 8, 8), 8, 1), r"run_tiled: argument `batch`.* \[3, 8, 8\]"),
    ],
)
def test_wrong_shapes(call, message):
    with pytest.raises(ShapeError, match=message):
        call(AutoencoderKL(LIKE_FLUX))


@pytest.mark.parametrize(
    "name", ["ResnetBlock2D", "Downsample2D", "Upsample2D", "Attention", "DownEncoderBlock2D", "UpDecoderBlock2D", "UNetMidBlock2D"]
)
def test_wrong_shapes_inside(name):
    module = next(module for module in AutoencoderKL(LIKE_FLUX).modules() if type(module).__name__ == name)
    with pytest.raises(ShapeError, match=rf"{name}.forward: argument `hidden_states`: .* got float32 \[3, 16, 16\]"):
        module(torch.ones(3, 16, 16))


def test_unsupported_config():
    with pytest.raises(ValueError, match="mid_block_add_attention=False is not supported"):
        AutoencoderKL.from_config({"mid_block_add_attention": False})


def _pad_all_sides(self, hidden_states):
    return torch.nn.functional.conv2d(hidden_states, self.conv.weight, self.conv.bias, stride=2, padding=1)


def _attend_without_residual(self, hidden_states, forward=autoencoder.Attention.forward):
    return forward(self, hidden_states) - hidden_states


def _smooth_upsample(self, hidden_states):
    return self.conv(torch.nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="bilinear"))


def _exchanged_moments(self, parameters, init=DiagonalGaussianDistribution.__init__):
    init(self, torch.cat(parameters.chunk(2, dim=1)[::-1], dim=1))


@pytest.mark.parametrize(
    "bug",
    [
        (autoencoder.Downsample2D, "forward", _pad_all_sides),
        (autoencoder.Upsample2D, "forward", _smooth_upsample),
        (autoencoder.Attention, "forward", _attend_without_residual),
        (autoencoder, "NORM_EPS", 1e-4),
        (DiagonalGaussianDistribution, "__init__", _exchanged_moments),
    ],
    ids=["symmetric padding", "smooth upsampling", "attention without residual", "eps of the norms", "mean and variance exchanged"],
)
def test_planted_bugs_are_found(bug, monkeypatch):
    monkeypatch.setattr(*bug)
    with pytest.raises(AssertionError):
        test_float32(LIKE_FLUX, (16, 24))


def test_planted_bug_in_the_blending_is_found(monkeypatch):
    monkeypatch.setattr(autoencoder, "blend", lambda before, after, overlap, axis: after)
    with pytest.raises(AssertionError):
        test_tiling(SHALLOW, (40, 56), torch.float32)
