"""The exported SD 1.5 example: both our pipeline and diffusers' load it and draw the same picture, and misfits are refused."""

import dataclasses
import subprocess

import numpy as np
import pytest
import torch
from conftest import randomize_
from diffusers import StableDiffusionPipeline as Reference
from sd15_checkpoints import UNET, write_parts

from flux_lab.sd15.checkpoints import load_unet, save_unet
from flux_lab.sd15.pipeline import load_sd15
from flux_lab.sd15.unet import UNet2DConditionModel
from flux_lab.training import export_sd15

QUICK = ["--scenes", "2", "--prompts", "0"]
FOLDERS = ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def as_options(parts):
    return [word for name, folder in parts.items() for word in (f"--{name}", str(folder))]


def test_diffusers_loads_it_and_draws_the_same_picture(parts, tmp_path, capsys):
    out = tmp_path / "mini"
    export_sd15.main([*as_options(parts), "--out", str(out), *QUICK])
    assert "loaded and drawn from" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted([*FOLDERS, "README.md", "SHA256SUMS", "model_index.json"])
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert load_unet(out).conv_in.weight.dtype == torch.float16
    pictures = []
    for pipe in (load_sd15(out), Reference.from_pretrained(out)):
        images = pipe("a small dark castle by the sea", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
        pictures.append(np.asarray(images[0]).astype(int))
    assert pictures[0].shape == (64, 64, 3)
    assert pictures[0].std() > 20
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert (pictures[0] != pictures[1]).mean() <= 0.001


MISFITS = {
    "cross_attention_dim": (28, "the UNet has cross_attention_dim=28, but CLIP's hidden_size is 20: not trained together"),
    "in_channels": (16, "the UNet has in_channels=16, but the VAE's latent_channels is 4"),
    "sample_size": (64, "the UNet has sample_size=64, but the VAE's sample_size / 8 is 8"),
}


@pytest.mark.parametrize("field", MISFITS)
def test_parts_that_do_not_fit_are_refused(field, parts, tmp_path, capsys):
    value, message = MISFITS[field]
    save_unet(UNet2DConditionModel(dataclasses.replace(UNET, **{field: value})), tmp_path / "unet")
    with pytest.raises(SystemExit) as stopped:
        export_sd15.main([*as_options(parts | {"unet": tmp_path / "unet"}), "--out", str(tmp_path / "mini")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mini").exists()


def test_a_unet_that_draws_nothing_is_refused(parts, tmp_path):
    unet = randomize_(load_unet(parts["unet"]))
    unet.conv_out.bias[0] = float("inf")
    save_unet(unet, tmp_path / "unet")
    with pytest.raises(ValueError, match=r"unet: conv_out\.bias has numbers that are not finite"):
        export_sd15.export(**parts | {"unet": tmp_path / "unet"}, out=tmp_path / "mini")
