"""flux_lab.sd15.checkpoints exchanges checkpoints with diffusers, today's and those as old as SD 1.5."""

import json

import diffusers
import pytest
import torch
from conftest import randomize_
from safetensors.torch import load_file, save_file
from sd15_checkpoints import SCHEDULERS, UNET, VAE, make_models, write_checkpoint

from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import OLD_ATTENTION, CheckpointError, load_autoencoder, read_model_index, save_model
from flux_lab.config import AutoencoderKLConfig
from flux_lab.sd15.checkpoints import LAYOUT, load_scheduler, load_unet, save_unet, write_sd15
from flux_lab.sd15.config import SD15_VAE
from flux_lab.sd15.pipeline import load_sd15
from flux_lab.sd15.unet import UNet2DConditionModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
# As the published checkpoint has it: older than scaling_factor, shift_factor and use_quant_conv.
PUBLISHED_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def assert_same_state(given, expected):
    given, expected = given.state_dict(), expected.state_dict()
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name


def rewrite(file, change):
    values = json.loads(file.read_text())
    file.write_text(json.dumps(change(values)))


def make_old(folder):
    """Turn a VAE's folder into one of 2022: without the later fields, and with the attention's former names."""
    rewrite(folder / "config.json", lambda values: {name: values[name] for name in PUBLISHED_VAE if name in values})
    state = load_file(folder / WEIGHTS)
    for old, new in OLD_ATTENTION.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor for name, tensor in state.items()}
    assert sum(".query." in name or ".proj_attn." in name for name in state) == 8
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def test_unets_are_exchanged_with_diffusers(tmp_path):
    unet = randomize_(UNet2DConditionModel(UNET))
    save_unet(unet, tmp_path / "ours")
    reference, info = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_state(reference, unet)
    reference.save_pretrained(tmp_path / "theirs")
    given = load_unet(tmp_path / "theirs")
    assert given.config == UNET
    assert_same_state(given, unet)
    assert load_unet(tmp_path / "theirs", torch.float16).conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_exchanged_with_diffusers(name, tmp_path):
    folder = write_checkpoint(tmp_path / "ours", name)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert type(reference.scheduler).__name__ == type(SCHEDULERS[name]).__name__
    reference.save_pretrained(tmp_path / "theirs")
    given = load_scheduler(tmp_path / "theirs")
    assert type(given) is type(SCHEDULERS[name])
    assert given.config == SCHEDULERS[name].config
    assert read_model_index(tmp_path / "theirs", LAYOUT).keys() == LAYOUT.parts.keys()
    assert load_sd15(tmp_path / "theirs").unet.config == UNET


def test_other_schedulers_are_refused(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(CheckpointError, match="expected class PNDMScheduler, found DDIMScheduler"):
        load_scheduler(tmp_path)


def test_other_pipelines_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="expected class FluxPipeline, found StableDiffusionPipeline"):
        read_model_index(folder)
    rewrite(folder / "model_index.json", lambda values: values | {"unet": ["diffusers", "UNet2DModel"]})
    with pytest.raises(CheckpointError, match="key 'unet': expected class UNet2DConditionModel, found UNet2DModel"):
        load_sd15(folder)


def test_a_pipeline_without_its_parts_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"expected \['scheduler', 'text_encoder', 'tokenizer', 'unet', 'vae'\]"):
        write_sd15(tmp_path, models={"vae": make_models()["vae"]}, scheduler=SCHEDULERS["pndm"], tokenizer=tmp_path)
    with pytest.raises(TypeError, match=r"expected one of .*, got UNet2DConditionModel"):
        save_model(make_models()["unet"], tmp_path)


# ---- as old as SD 1.5 ---------------------------------------------------------------------------------------------------


def test_the_published_autoencoders_config_is_the_preset():
    assert AutoencoderKLConfig.from_dict(PUBLISHED_VAE) == SD15_VAE
    reference = diffusers.AutoencoderKL.from_config({**PUBLISHED_VAE, "block_out_channels": [32] * 4})
    for field in AutoencoderKLConfig.LEFT_OUT:
        assert getattr(reference.config, field) == getattr(SD15_VAE, field), field


def test_old_names_of_the_autoencoders_attention(tmp_path):
    vae = randomize_(AutoencoderKL(VAE))
    save_model(vae, tmp_path)
    make_old(tmp_path)
    given = load_autoencoder(tmp_path)
    assert_same_state(given, vae)
    assert_same_state(given, diffusers.AutoencoderKL.from_pretrained(tmp_path))
    assert (given.config.scaling_factor, given.config.shift_factor) == (0.18215, None)


def test_exchanged_old_names_would_be_noticed(tmp_path):
    vae = randomize_(AutoencoderKL(VAE))
    save_model(vae, tmp_path)
    make_old(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    query, key = (f"encoder.mid_block.attentions.0.{name}.weight" for name in ("query", "key"))
    save_file(state | {query: state[key], key: state[query]}, tmp_path / WEIGHTS)
    with pytest.raises(AssertionError, match="to_q"):
        assert_same_state(load_autoencoder(tmp_path), vae)


def test_a_whole_checkpoint_of_that_time(tmp_path):
    """With a safety checker in its index, CLIP's keys under `text_model.`, and the old autoencoder."""
    folder = write_checkpoint(tmp_path)
    make_old(folder / "vae")
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    checker |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    rewrite(folder / "model_index.json", lambda values: values | checker)
    rewrite(folder / "scheduler" / "scheduler_config.json", lambda values: values | {"trained_betas": None, "clip_sample": False})
    file = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    pipe = load_sd15(folder)
    for name, model in make_models().items():
        assert_same_state(getattr(pipe, name), model)
