"""flux_lab.checkpoints reads and writes what diffusers and transformers read and write, and refuses everything else clearly."""

import dataclasses
import inspect
import json
import os

import diffusers
import pytest
import torch
import transformers
from conftest import randomize_
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_lab import checkpoints
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import (
    CheckpointError,
    check_device,
    load_autoencoder,
    load_clip,
    load_scheduler,
    load_t5,
    load_transformer,
    save_model,
)
from flux_lab.clip import CLIPTextModel
from flux_lab.config import FLUX_DEV_SCHEDULER, TINY, TINY_CLIP, TINY_T5, TINY_VAE, FluxTransformer2DConfig
from flux_lab.inference.quantization import quantize
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


def convert_like_diffusers(state, config):
    """diffusers' converter, which has FLUX.1's width written into it, with the width of our tiny model."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {config.inner_dim}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(state))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("config", [TINY, SCHNELL], ids=["dev", "schnell"])
def test_original_transformer(config, prefix, tmp_path):
    state = original_transformer_state(config)
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "flux.safetensors")
    given = load_transformer(tmp_path / "flux.safetensors")
    assert given.config == config
    assert_same_state(given, convert_like_diffusers(state, config))


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
    save_file(
        {f"{prefix}{name}": tensor for name, tensor in state.items()} | ({"else": torch.ones(1)} if prefix else {}),
        tmp_path / "ae.safetensors",
    )
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


# -------------------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture
def tokenizer_folders(tmp_path):
    """The smallest tokenizers that transformers opens."""
    clip, t5 = tmp_path / "clip_tokenizer", tmp_path / "t5_tokenizer"
    vocabulary = {token: index for index, token in enumerate(["a", "a</w>", "<|startoftext|>", "<|endoftext|>"])}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(clip)
    transformers.T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]).save_pretrained(t5)
    return {"tokenizer": clip, "tokenizer_2": t5}


@pytest.fixture
def pipeline_folder(tmp_path, tokenizer_folders):
    models = {"transformer": make("transformer"), "vae": make("vae"), "text_encoder": make("clip"), "text_encoder_2": make("t5")}
    scheduler = FlowMatchEulerDiscreteScheduler(FLUX_DEV_SCHEDULER)
    checkpoints.write_pipeline(tmp_path / "pipeline", models=models, scheduler=scheduler, tokenizers=tokenizer_folders)
    return tmp_path / "pipeline"


def test_upstream_loads_our_pipeline(pipeline_folder):
    reference = diffusers.FluxPipeline.from_pretrained(pipeline_folder)
    for name, part in (("transformer", "transformer"), ("vae", "vae"), ("clip", "text_encoder"), ("t5", "text_encoder_2")):
        assert_same_state(getattr(reference, part), make(name))
    assert reference.scheduler.config.use_dynamic_shifting
    assert reference.scheduler.config.shift == FLUX_DEV_SCHEDULER.shift
    reference.save_pretrained(pipeline_folder.with_name("theirs"))
    assert checkpoints.read_model_index(pipeline_folder.with_name("theirs")).keys() == checkpoints.PIPELINE_PARTS.keys()


def test_every_component_is_found_in_a_pipeline_folder(pipeline_folder):
    assert checkpoints.read_model_index(pipeline_folder)["transformer"] == "FluxTransformer2DModel"
    for name in ("transformer", "vae", "clip", "t5"):
        assert_same_state(OURS[name][2](pipeline_folder), make(name))
    for folder in (pipeline_folder, pipeline_folder / "scheduler"):
        assert load_scheduler(folder).config == FLUX_DEV_SCHEDULER


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "expected class FluxPipeline, found StableDiffusionPipeline"),
        (
            {"transformer": ["diffusers", "SD3Transformer2DModel"]},
            "key 'transformer': expected class FluxTransformer2DModel, found SD3Transformer2DModel",
        ),
        ({"text_encoder_2": [None, None]}, "key 'text_encoder_2': expected class T5EncoderModel, found nothing"),
        ({"safety_checker": ["diffusers", "Checker"]}, "key 'safety_checker': expected class null, found Checker"),
    ],
)
def test_bad_model_index(change, message, tmp_path):
    parts = {name: list(part[:2]) for name, part in checkpoints.PIPELINE_PARTS.items()}
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline"} | parts | {"image_encoder": [None, None]} | change)
    )
    with pytest.raises(CheckpointError, match=f"model_index.json.*{message}"):
        checkpoints.read_model_index(tmp_path)


def test_write_pipeline_refuses_missing_parts(tmp_path):
    with pytest.raises(ValueError, match=r"expected \['scheduler', .* got \['scheduler', 'vae'\]"):
        checkpoints.write_pipeline(tmp_path, models={"vae": make("vae")}, scheduler=FlowMatchEulerDiscreteScheduler(), tokenizers={})


def test_write_pipeline_writes_nothing_when_one_part_cannot_be_read_again(tmp_path, tokenizer_folders):
    models = {"transformer": make("transformer"), "vae": make("vae"), "text_encoder": make("clip")}
    models["text_encoder_2"] = quantize(make("t5"), "int8")
    with pytest.raises(ValueError, match=r"model: .*, got torch\.int8 .*: a quantized model is written by save_quantized"):
        checkpoints.write_pipeline(
            tmp_path / "pipeline", models=models, scheduler=FlowMatchEulerDiscreteScheduler(), tokenizers=tokenizer_folders
        )
    assert not (tmp_path / "pipeline").exists()


# ----------------------------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in distinct storages that are alive, looked up after every operation.

    Every storage that an operation reads or makes is watched by a weak reference, so it counts until it is freed.
    """

    def __init__(self):
        super().__init__()
        self.watched = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self.watched[StorageWeakRef(storage)] = storage.nbytes()
        self.watched = {reference: size for reference, size in self.watched.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.watched.values()))
        return result


def peak_while_loading(load):
    with LiveBytes() as live:
        model = load()
    assert sum(tensor.nbytes for tensor in model.parameters()) <= live.peak
    return live.peak


WIDE = dataclasses.replace(
    TINY, num_layers=4, num_single_layers=6, attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(4, 14, 14)
)


@pytest.mark.parametrize(("stored", "dtype"), [("float32", None), ("bfloat16", None), ("float32", "bfloat16")])
@pytest.mark.parametrize("layout", ["diffusers", "sharded", "original"])
def test_memory_is_not_allocated_twice(layout, stored, dtype, tmp_path):
    stored, dtype = getattr(torch, stored), dtype and getattr(torch, dtype)
    if layout == "original":
        save_file({name: tensor.to(stored) for name, tensor in original_transformer_state(WIDE).items()}, tmp_path / "flux.safetensors")
        path = tmp_path / "flux.safetensors"
    else:
        save_model(FluxTransformer2DModel(WIDE).to(stored), tmp_path)
        path = tmp_path
    if layout == "sharded":
        reference = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=stored)
        path = tmp_path / "sharded"
        reference.save_pretrained(path, max_shard_size="1MB")
        del reference
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    assert peak_while_loading(lambda: load_transformer(path, dtype=dtype)) <= 1.1 * size


def test_memory_test_finds_a_second_copy(tmp_path, monkeypatch):
    """What building the model with memory of its own would cost."""
    save_model(make("transformer"), tmp_path)
    size = weights_in(tmp_path).stat().st_size
    real = torch.device
    monkeypatch.setattr(torch, "device", lambda name: real("cpu" if name == "meta" else name))
    assert peak_while_loading(lambda: load_transformer(tmp_path)) > 1.5 * size


# ----------------------------------------------------------------------------------------------------------------------- errors


def edit_state(folder, change):
    state = load_file(weights_in(folder))
    change(state)
    save_file(state, weights_in(folder))


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BIAS = "x_embedder.bias"
SPOILED = {
    "missing key": (
        lambda folder: edit_state(folder, lambda state: state.pop(BIAS)),
        rf"key '{BIAS}': expected shape \[32\], found nothing",
    ),
    "extra key": (
        lambda folder: edit_state(folder, lambda state: state.update(more=torch.ones(3))),
        r"model.safetensors: key 'more': expected no such key in a FluxTransformer2DModel.*, found one of shape \[3\]",
    ),
    "wrong shape": (
        lambda folder: edit_state(folder, lambda state: state.update({BIAS: torch.ones(31)})),
        rf"model.safetensors: key '{BIAS}': expected shape \[32\], found \[31\]",
    ),
    "wrong dtype": (
        lambda folder: edit_state(folder, lambda state: state.update({BIAS: torch.ones(32, dtype=torch.int8)})),
        rf"key '{BIAS}': expected numbers as F32, F16, BF16, found I8, which is not supported",
    ),
    "truncated": (
        lambda folder: weights_in(folder).write_bytes(weights_in(folder).read_bytes()[:-4]),
        r"model.safetensors: expected a whole safetensors file, found \d+ bytes, truncated or corrupt",
    ),
    "truncated in the header": (
        lambda folder: weights_in(folder).write_bytes(weights_in(folder).read_bytes()[:100]),
        "found 100 bytes, truncated",
    ),
    "corrupt": (lambda folder: weights_in(folder).write_bytes(b"\xff" * 5000), "found 5000 bytes, truncated or corrupt"),
    "empty": (lambda folder: weights_in(folder).write_bytes(b""), "found 0 bytes, truncated or corrupt"),
    "a pickle under our name": (
        lambda folder: weights_in(folder).write_bytes(b"PK\x03\x04" + bytes(900)),
        "only safetensors are read: this is a pickle",
    ),
    "an old pickle": (
        lambda folder: weights_in(folder).write_bytes(b"\x80\x02}q\x00." + bytes(900)),
        "only safetensors are read: this is a pickle",
    ),
    "a pickle alone": (
        lambda folder: weights_in(folder).rename(folder / "diffusion_pytorch_model.bin"),
        "model.bin: only safetensors are read: this is a pickle.*use_safetensors=False",
    ),
    "no weights": (lambda folder: weights_in(folder).unlink(), "expected diffusion_pytorch_model.safetensors or .*, found config.json"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "expected config.json and .*, found diffusion_pytorch_model.safetensors",
    ),
    "config is no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json: expected json, found something else"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a json object, found list"),
    "another class": (
        lambda folder: edit_config(folder, _class_name="UNet2DModel"),
        "config.json.*expected class FluxTransformer2DModel, found UNet2DModel",
    ),
    "another option": (lambda folder: edit_config(folder, patch_size=2), "config.json: .*patch_size=2 is not supported"),
    "a size of another kind": (
        lambda folder: edit_config(folder, num_layers="2"),
        "'str' object cannot be interpreted as an integer",
    ),
    "another size": (lambda folder: edit_config(folder, num_attention_heads=3), r"key '.*': expected shape \[.*\], found \["),
    "more blocks": (
        lambda folder: edit_config(folder, num_layers=3),
        r"key 'transformer_blocks.2.*': expected shape .*, found nothing, and 31 more",
    ),
    "fewer blocks": (lambda folder: edit_config(folder, num_layers=1), "key 'transformer_blocks.1.*': expected no such key"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_bad_folders(spoil, message, tmp_path):
    folder = tmp_path / "flux"
    save_model(make("transformer"), folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(folder)
    assert str(folder) in str(caught.value)


def test_bad_sizes_of_the_autoencoder(tmp_path):
    save_model(make("vae"), tmp_path)
    for field, value in [("sample_size", [64, 64]), ("norm_num_groups", 0)]:
        edit_config(tmp_path, **{field: value})
        with pytest.raises(CheckpointError, match=rf"config.json: {field}=.* is not supported, expected one positive integer"):
            load_autoencoder(tmp_path)
        edit_config(tmp_path, **{field: getattr(TINY_VAE, field)})


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:77", "xla", 1.5])
def test_a_device_that_is_not_there(device, tmp_path):
    save_model(make("transformer"), tmp_path)
    for load in (check_device, lambda device: load_transformer(tmp_path, device=device)):
        with pytest.raises(ValueError, match=f"device: expected one that is here, got '{device}' ") as caught:
            load(device)
        assert not isinstance(caught.value, CheckpointError)


def test_a_device_that_is_there():
    for device in ("cpu", torch.device("cpu")):
        assert check_device(device) == torch.device("cpu")


def test_bad_shards(tmp_path):
    save_model(make("vae"), tmp_path / "ours")
    folder = tmp_path / "theirs"
    OURS["vae"][3].from_pretrained(tmp_path / "ours").save_pretrained(folder, max_shard_size="20KB")
    with pytest.raises(CheckpointError, match=r"expected a folder without a sharded checkpoint"):
        save_model(make("vae"), folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = folder / min(weight_map.values())
    index.write_text(json.dumps({"weight_map": weight_map | {"more": shard.name}}))
    with pytest.raises(CheckpointError, match=r"key 'more': expected a tensor, which the index says is here, found nothing"):
        load_autoencoder(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected for each tensor a file of this folder"):
        load_autoencoder(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: expected a safetensors file, which the index names, found nothing"):
        load_autoencoder(folder)


def test_bad_lone_files(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file({"layer.weight": torch.ones(2)}, file)
    with pytest.raises(
        CheckpointError, match=r"key 'x_embedder.weight': expected FluxTransformer2DModel in the diffusers or the original layout, found"
    ):
        load_transformer(file)
    with pytest.raises(CheckpointError, match=r"expected a folder with config.json, which CLIPTextModel needs, found a lone file"):
        load_clip(file)
    state = original_transformer_state(TINY)
    save_file(state | {"double_blocks.0.img_attn.lora": torch.ones(2)}, file)
    with pytest.raises(
        CheckpointError, match=r"key 'double_blocks.0.img_attn.lora': expected a name of FluxTransformer2DModel's original layout"
    ):
        load_transformer(file)
    state["double_blocks.1.img_attn.qkv.weight"] = torch.ones(97, 32)
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"key 'double_blocks.1.img_attn.qkv.weight': expected shape \[96, 32\], found \[97, 32\]"):
        load_transformer(file)
    save_file(original_autoencoder_state(AutoencoderKL(dataclasses.replace(TINY_VAE, use_quant_conv=True))), file)
    with pytest.raises(CheckpointError, match="its scaling factor is unknown: give config="):
        load_autoencoder(file)
    (tmp_path / "some.ckpt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"some.ckpt: only safetensors are read"):
        load_transformer(tmp_path / "some.ckpt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_model(make("vae"), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoints, "write_json", lambda file, values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(randomize_(make("vae"), seed=1), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_save_refuses_other_modules(tmp_path):
    with pytest.raises(TypeError, match=r"expected one of .*'AutoencoderKL'.* got Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path)


# -------------------------------------------------------------------------------------------------------------------------- hub


def test_hub_ids(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    save_model(make("vae"), tmp_path / "vae")
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same_state(load_autoencoder("black-forest-labs/FLUX.1-dev"), make("vae"))
    assert asked["name"] == "black-forest-labs/FLUX.1-dev"
    wanted = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    unwanted = ["flux1-dev.safetensors", "transformer/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/model.bin"]
    assert list(huggingface_hub.utils.filter_repo_objects(wanted + unwanted, allow_patterns=asked["patterns"])) == wanted

    def refuse(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    response = type("Response", (), {"headers": {}, "request": None})()
    for error, message in [
        (errors.GatedRepoError("no", response=response), r"owner/model: this model is gated: accept its licence at https://.*/owner/model"),
        (errors.RepositoryNotFoundError("no", response=response), "owner/model: no such folder, and no such model on the hub"),
        (errors.LocalEntryNotFoundError("no"), "owner/model: no such folder, nor in the hub's cache, and the hub cannot be reached"),
        (ConnectionError("no"), "the hub cannot be reached"),
    ]:
        refuse(error)
        with pytest.raises(CheckpointError, match=message):
            load_transformer("owner/model")


def test_hub_without_network():
    with pytest.raises(CheckpointError, match="nobody/nothing: no such folder, nor in the hub's cache, and the hub cannot be reached"):
        load_transformer("nobody/nothing")


@pytest.mark.parametrize("path", ["/no/such/folder", "nowhere", "./no/folder", "a/b/c"])
def test_no_such_path(path):
    with pytest.raises(CheckpointError, match=rf"{path}: expected a folder, a .safetensors file or a hub id"):
        load_transformer(path)


@pytest.mark.parametrize("path", ["runs/flux--old", "runs/flux.git", "runs/flux-"])
def test_no_such_folder_and_no_hub_id(path):
    with pytest.raises(CheckpointError, match=rf"{path}: no such folder, and no hub id"):
        load_transformer(path)
