"""flux_lab.checkpoints reads and writes what diffusers and transformers read and write, and refuses everything else clearly."""

import dataclasses
import gc
import json
import os
import shutil

import diffusers
import pytest
import torch
import transformers
from conftest import randomize_
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from flux_lab import checkpoints
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import CheckpointError, load_autoencoder, load_clip, load_scheduler, load_t5, load_transformer, save_model
from flux_lab.clip import CLIPTextModel
from flux_lab.config import FLUX_DEV_SCHEDULER, TINY, TINY_CLIP, TINY_T5, TINY_VAE, FluxTransformer2DConfig
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

SCHNELL = dataclasses.replace(TINY, guidance_embeds=False, in_channels=12, out_channels=20)
OURS = {
    "transformer": (FluxTransformer2DModel, TINY, load_transformer, diffusers.FluxTransformer2DModel),
    "schnell": (FluxTransformer2DModel, SCHNELL, load_transformer, diffusers.FluxTransformer2DModel),
    "vae": (AutoencoderKL, TINY_VAE, load_autoencoder, diffusers.AutoencoderKL),
    "clip": (CLIPTextModel, TINY_CLIP, load_clip, transformers.CLIPTextModel),
    "t5": (T5EncoderModel, TINY_T5, load_t5, transformers.T5EncoderModel),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(name, dtype=torch.float32):
    model_class, config, *_ = OURS[name]
    return randomize_(model_class(config)).to(dtype)


def weights_in(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def assert_same_state(given, expected):
    given = given if isinstance(given, dict) else given.state_dict()
    expected = expected if isinstance(expected, dict) else expected.state_dict()
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype, name
        assert torch.equal(given[name], tensor), name


# ------------------------------------------------------------------------------------------------- what we and upstream exchange


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_upstream_loads_what_we_write(name, dtype, tmp_path):
    model = make(name, dtype)
    save_model(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", weights_in(tmp_path).name]
    key = "torch_dtype" if name in ("transformer", "schnell", "vae") else "dtype"
    reference, info = OURS[name][3].from_pretrained(tmp_path, output_loading_info=True, **{key: dtype})
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for key, tensor in reference.state_dict().items():
        if dtype == torch.float16 and ".wo." in key:
            tensor = tensor.half()
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_we_load_what_upstream_writes(name, dtype, tmp_path):
    save_model(make(name), tmp_path / "ours")
    key = "torch_dtype" if name in ("transformer", "schnell", "vae") else "dtype"
    reference = OURS[name][3].from_pretrained(tmp_path / "ours", **{key: dtype})
    reference.save_pretrained(tmp_path / "theirs")
    given = OURS[name][2](tmp_path / "theirs")
    assert_same_state(given, reference)
    assert not given.training
    if name not in ("clip", "t5"):
        assert given.config == OURS[name][1]


@pytest.mark.parametrize("name", OURS)
def test_we_load_what_we_write(name, tmp_path):
    model = make(name)
    save_model(model, tmp_path)
    given = OURS[name][2](tmp_path)
    assert given.config == model.config
    assert_same_state(given, model)
    save_model(given, tmp_path)
    assert_same_state(OURS[name][2](tmp_path), model)


@pytest.mark.parametrize("name", ["transformer", "vae", "t5"])
def test_sharded(name, tmp_path):
    save_model(make(name), tmp_path / "ours")
    reference = OURS[name][3].from_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert_same_state(OURS[name][2](tmp_path / "theirs"), make(name))


@pytest.mark.parametrize("name", OURS)
def test_dtype_is_cast(name, tmp_path):
    save_model(make(name), tmp_path)
    for dtype in DTYPES:
        for key, tensor in OURS[name][2](tmp_path, dtype=dtype).state_dict().items():
            assert tensor.dtype == (torch.float32 if dtype == torch.float16 and ".wo." in key else dtype), key


@pytest.mark.parametrize("prefixed", [True, False])
def test_clip_with_prefix_and_buffers(prefixed, tmp_path):
    model = make("clip")
    save_model(model, tmp_path)
    prefix = "text_model." if prefixed else ""
    state = {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}
    save_file(state | {f"{prefix}embeddings.position_ids": torch.arange(16)[None]}, weights_in(tmp_path))
    assert_same_state(load_clip(tmp_path), model)


@pytest.mark.parametrize("names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]], ids=str)
def test_t5_embedding_under_either_name(names, tmp_path):
    model = make("t5")
    save_model(model, tmp_path)
    state = load_file(weights_in(tmp_path))
    table = state.pop("shared.weight")
    save_file(state | {f"{name}.weight": table.clone() for name in names}, weights_in(tmp_path))
    given = load_t5(tmp_path)
    assert_same_state(given, model)
    assert given.shared.weight is given.encoder.embed_tokens.weight


# ------------------------------------------------------------------------------------------------------------- the original layout


def original_transformer_state(config):
    """Random tensors under the names of the original repository's `Flux` module."""
    dim, head_dim = config.inner_dim, config.attention_head_dim
    sizes = {}

    def linear(name, rows, columns):
        sizes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    guidance = ["guidance_in"] if config.guidance_embeds else []
    for name, columns in [("time_in", 256), ("vector_in", config.pooled_projection_dim), *((name, 256) for name in guidance)]:
        linear(f"{name}.in_layer", dim, columns)
        linear(f"{name}.out_layer", dim, dim)
    linear("img_in", dim, config.in_channels)
    linear("txt_in", dim, config.joint_attention_dim)
    for i in range(config.num_layers):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * dim, dim)
            linear(f"{block}_attn.qkv", 3 * dim, dim)
            linear(f"{block}_attn.proj", dim, dim)
            linear(f"{block}_mlp.0", 4 * dim, dim)
            linear(f"{block}_mlp.2", dim, 4 * dim)
            sizes.update({f"{block}_attn.norm.{side}_norm.scale": (head_dim,) for side in ("query", "key")})
    for i in range(config.num_single_layers):
        linear(f"single_blocks.{i}.modulation.lin", 3 * dim, dim)
        linear(f"single_blocks.{i}.linear1", 7 * dim, dim)
        linear(f"single_blocks.{i}.linear2", dim, 5 * dim)
        sizes.update({f"single_blocks.{i}.norm.{side}_norm.scale": (head_dim,) for side in ("query", "key")})
    linear("final_layer.adaLN_modulation.1", 2 * dim, dim)
    linear("final_layer.linear", config.out_channels or config.in_channels, dim)
    return {name: torch.randn(size) for name, size in sizes.items()}


def convert_like_diffusers(state, config, monkeypatch_source):
    """diffusers' converter, which has FLUX.1's width written into it, with the width of our tiny model."""
    import inspect

    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert monkeypatch_source in source
    scope = dict(vars(single_file_utils))
    exec(source.replace(monkeypatch_source, f"inner_dim = {config.inner_dim}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(state))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("config", [TINY, SCHNELL], ids=["dev", "schnell"])
def test_original_transformer(config, prefix, tmp_path):
    state = original_transformer_state(config)
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "flux.safetensors")
    given = load_transformer(tmp_path / "flux.safetensors")
    assert given.config == config
    assert_same_state(given, convert_like_diffusers(state, config, "inner_dim = 3072"))


@pytest.mark.parametrize(("head_dim", "axes"), [(128, (16, 56, 56)), (32, (4, 14, 14)), (16, (4, 6, 6))])
def test_axes_of_the_original_layout_follow_from_the_head_width(head_dim, axes, tmp_path):
    config = FluxTransformer2DConfig(2 * head_dim, None, 1, 1, head_dim, 1, 8, 8, False, axes)
    save_file(original_transformer_state(config), tmp_path / "flux.safetensors")
    assert load_transformer(tmp_path / "flux.safetensors").config.axes_dims_rope == axes
    other = dataclasses.replace(config, axes_dims_rope=(head_dim - 4, 2, 2))
    assert load_transformer(tmp_path / "flux.safetensors", config=other).config == other


def original_autoencoder_state(model):
    """The tensors of `model` under the names of the original repository, by a rule of its own: the inverse of the table."""
    state = {}
    levels = len(model.config.block_out_channels)
    for name, tensor in model.state_dict().items():
        words = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out").split(".")
        if "down_blocks" in words:
            words[1:4] = ["down", words[2], {"resnets": "block", "downsamplers": "downsample"}[words[3]]]
        elif "up_blocks" in words:
            words[1:4] = ["up", str(levels - 1 - int(words[2])), {"resnets": "block", "upsamplers": "upsample"}[words[3]]]
        elif "resnets" in words:
            words[1:4] = ["mid", f"block_{int(words[3]) + 1}"]
        elif "attentions" in words:
            layer = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[words[4]]
            words[1:-1] = ["mid", "attn_1", layer]
            tensor = tensor[:, :, None, None] if layer != "norm" and tensor.ndim == 2 else tensor
        if len(words) > 4 and words[3] in ("downsample", "upsample"):
            del words[4]
        state[".".join(words)] = tensor.contiguous()
    return state


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_original_autoencoder(prefix, tmp_path):
    config = dataclasses.replace(TINY_VAE, layers_per_block=2)
    model = randomize_(AutoencoderKL(config))
    state = original_autoencoder_state(model)
    assert "decoder.up.3.upsample.conv.weight" in state
    assert state["encoder.mid.attn_1.q.weight"].ndim == 4
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()} | ({"else": torch.ones(1)} if prefix else {}), tmp_path / "ae.safetensors")
    converted = single_file_utils.convert_ldm_vae_checkpoint(dict(state), config.to_dict())
    given = load_autoencoder(tmp_path / "ae.safetensors", config=config)
    assert_same_state(given, converted)
    assert_same_state(given, model)


def test_original_autoencoder_sizes_are_read_off_the_tensors(tmp_path):
    config = dataclasses.replace(TINY_VAE, block_out_channels=(32, 64, 96), norm_num_groups=32, latent_channels=6, sample_size=1024)
    save_file(original_autoencoder_state(AutoencoderKL(config)), tmp_path / "ae.safetensors")
    assert load_autoencoder(tmp_path / "ae.safetensors").config == config


@pytest.mark.parametrize("name", ["transformer", "schnell", "vae"])
def test_lone_file_in_the_diffusers_layout(name, tmp_path):
    model = make(name)
    save_model(model, tmp_path)
    assert OURS[name][2](weights_in(tmp_path)).config == model.config
    (tmp_path / "config.json").unlink()
    given = OURS[name][2](weights_in(tmp_path), config=model.config if name == "vae" else None)
    assert given.config == model.config
    assert_same_state(given, model)


@pytest.mark.parametrize("planted", ["swap", "split", "reverse"])
def test_planted_bugs_in_the_table_are_found(planted, tmp_path, monkeypatch):
    changed = {
        "swap": lambda row: row._replace(note="") if row.note == checkpoints.SWAP else row,
        "split": lambda row: row._replace(ours=(row.ours[1], row.ours[0], *row.ours[2:])) if len(row.ours) > 1 else row,
        "reverse": lambda row: row._replace(ours=tuple(name.replace("last-i", "i") for name in row.ours)),
    }[planted]
    if planted == "reverse":
        component = checkpoints.AUTOENCODER._replace(renaming=tuple(map(changed, checkpoints.AUTOENCODER_RENAMING)))
        monkeypatch.setattr(checkpoints, "AUTOENCODER", component)
        with pytest.raises((AssertionError, CheckpointError)):
            test_original_autoencoder("", tmp_path)
    else:
        component = checkpoints.TRANSFORMER._replace(renaming=tuple(map(changed, checkpoints.TRANSFORMER_RENAMING)))
        monkeypatch.setattr(checkpoints, "TRANSFORMER", component)
        with pytest.raises(AssertionError):
            test_original_transformer(TINY, "", tmp_path)
