"""The SD 1.5 example's card: its numbers are those of the logs and of the measurements, and what was not measured is left out."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sd15_checkpoints import make_models, write_checkpoint

from flux_lab.sd15.pipeline import load_sd15
from flux_lab.training import card_sd15
from flux_lab.training.captions import Stated, StatedObject
from flux_lab.training.evaluate import sample_captions, sample_scenes
from flux_lab.training.loop import CHECKPOINT, Settings
from flux_lab.training.quality import reconstruct
from flux_lab.training.scenes import render

SCENES = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "sd15-tiny")


@pytest.fixture(scope="module")
def pipe(model):
    return load_sd15(model)


@pytest.fixture(scope="module")
def report(pipe):
    other = make_models()["vae"]
    return card_sd15.measure(pipe, other, None, scenes=SCENES, prompts=5, steps=2)


def write_run(folder, losses, **settings):
    """What a training stage leaves behind: three seconds a step."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss, "seconds": 3.0 * (step + 1)}) for step, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    metadata = {"step": str(len(losses)), "settings": json.dumps(dataclasses.asdict(Settings(steps=len(losses), **settings)))}
    save_file({"x": torch.zeros(1)}, folder / CHECKPOINT, metadata)
    return folder


def test_both_autoencoders_are_measured_on_the_same_scenes(report, pipe):
    both = report["reconstruction"]
    assert list(both) == ["this one", "flux-mini's"]
    assert [each["channels"] for each in both.values()] == [4, 4]
    images = render(sample_scenes(SCENES), 64)
    decoded, latents = reconstruct(pipe.vae, images)
    error = ((images.astype(float) - decoded) ** 2).mean(axis=(1, 2, 3))
    assert both["this one"]["psnr"] == pytest.approx((10 * np.log10(255**2 / error)).mean(), rel=1e-6)
    assert both["this one"]["latent_std"] == pytest.approx(latents.std().item(), rel=1e-5)


def test_noise_errors_are_those_of_the_network(report, pipe):
    assert list(report["noise"]) == list(card_sd15.TIMESTEPS)
    scenes = sample_scenes(SCENES)
    _, latents = reconstruct(pipe.vae, render(scenes, 64))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    kept = pipe.scheduler.alphas_cumprod[600]
    text = pipe.encode_prompt([caption.text for caption in sample_captions(scenes)])
    with torch.no_grad():
        predicted = pipe.unet(kept**0.5 * latents + (1 - kept) ** 0.5 * noise, 600, text)
    assert report["noise"][600] == pytest.approx((predicted - noise).square().mean().item(), rel=1e-4)


def test_prompts_are_drawn_and_read(pipe, monkeypatch):
    seen = []

    def read(reader, images):
        seen.append(images)
        return [Stated((StatedObject("cube", "red", "large", "matte"),))] * len(images)

    monkeypatch.setattr(card_sd15, "read_attributes", read)
    report = card_sd15.measure(pipe, None, "reader", scenes=1, prompts=3, steps=2)
    assert seen[0].shape == (3, 64, 64, 3)
    assert report["obedience"]["count"]["count"] == 3
    assert "3 prompts of held-out combinations, PNDM with 2 steps" in card_sd15.obedience_section(report)
    alone = pipe(sample_captions(sample_scenes(3, 1), 1)[2].text, generator=torch.Generator().manual_seed(2), num_inference_steps=2)
    assert np.abs(seen[0][2].astype(int) - np.asarray(alone.images[0])).max() <= 1


def test_the_card_says_what_was_trained_and_measured(model, report, tmp_path):
    folders = {
        "clip": tmp_path / "clip",
        "vae": write_run(tmp_path / "sd15_vae", [1.5, 0.25], batch_size=16, learning_rate=1e-3),
        "unet": write_run(tmp_path / "unet", [1.0, 0.5, 0.125], batch_size=8, learning_rate=5e-4, ema=0.99),
    }
    card_sd15.write_card(tmp_path / "README.md", model, report, folders, "python -m export", trained_on="two cores")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert "# sd15-tiny\n" in text
    assert f"`scaling_factor`, {0.18215}" in text
    (unet,) = (line for line in text.splitlines() if line.startswith("| UNet"))
    assert [cell.strip() for cell in unet.split("|")[2:-1]] == ["3", "8", "24", "0 min", "1 to 0.542"]
    assert "CLIP text encoder, captions" not in text
    assert f"--out {tmp_path / 'unet'} --steps 3 --batch 8 --rate 0.0005 --decay 0.3 --ema 0.99" in text
    assert "two cores" in text
    assert f"{report['reconstruction']['this one']['psnr']:.2f} dB" in text
    assert f"{report['noise'][200]:.4f}" in text
    assert "obeyed" not in text
    assert "prompts of held-out" not in text
    assert "{" not in text
