"""flux_lab.inference.quantization: which layers are swapped, what is written, what is refused."""

import errno
import os
import shutil

import pytest
import torch
from conftest import randomize_
from safetensors.torch import load_file, save_file
from test_inference_hoisting import conditioning_of
from test_transformer import make_inputs
from torch import nn

from flux_lab import checkpoints, data_dir
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import CheckpointError, load_transformer, save_model
from flux_lab.clip import CLIPTextModel
from flux_lab.config import TINY, TINY_CLIP, TINY_T5, TINY_VAE
from flux_lab.inference import quantization
from flux_lab.inference.hoisting import hoist
from flux_lab.inference.quantization import (
    SCHEMES,
    linear_names,
    load_quantized,
    quantize,
    quantize_checkpoint,
    save_quantized,
    scheme_of,
    stored_scheme,
)
from flux_lab.inference.quantized_linear import QuantizedLinear
from flux_lab.t5 import T5EncoderModel
from flux_lab.transformer import FluxTransformer2DModel

EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
MAKERS = {"transformer": lambda: FluxTransformer2DModel(TINY), "t5": lambda: T5EncoderModel(TINY_T5)}


def make(name="transformer", dtype=torch.float32):
    return randomize_(MAKERS[name]()).to(dtype)


def inputs_of(name):
    return make_inputs(TINY) if name == "transformer" else {"input_ids": torch.randint(0, TINY_T5.vocab_size, (2, 7))}


@EVERY_SCHEME
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_swapped(name, scheme):
    model = make(name)
    names = linear_names(model)
    assert quantize(model, scheme) is model
    swapped = {key for key, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    left = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert swapped == set(names)
    assert {type(model.get_submodule(key)) for key in names} == {SCHEMES[scheme]}
    assert left == {f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(TINY_T5.num_layers)} if name == "t5" else left == set()
    assert scheme_of(model) == scheme


@EVERY_SCHEME
@pytest.mark.parametrize("name", MAKERS)
def test_the_model_still_computes_the_same_but_for_rounding(name, scheme):
    model, inputs = make(name), inputs_of(name)
    exact = model(**inputs)
    given = quantize(model, scheme)(**inputs)
    assert 0 < (given - exact).norm() < {"int8": 0.1, "nf4": 0.5}[scheme] * exact.norm()


@EVERY_SCHEME
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_written_and_read(name, scheme, dtype, tmp_path):
    model = quantize(make(name, dtype), scheme)
    file = save_quantized(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["config.json", file.name])
    assert stored_scheme(file) == scheme
    given = load_quantized(tmp_path, scheme)
    assert given.config == model.config
    assert not given.training
    for key, tensor in model.state_dict().items():
        assert given.state_dict()[key].dtype == tensor.dtype, key
        assert torch.equal(given.state_dict()[key], tensor), key
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs_of(name).items()}
    assert torch.equal(given(**inputs), model(**inputs))


def test_a_quantized_file_is_smaller(tmp_path):
    save_model(make(dtype=torch.bfloat16), tmp_path / "bf16")
    sizes = {"bf16": next((tmp_path / "bf16").glob("*.safetensors")).stat().st_size}
    for scheme in SCHEMES:
        sizes[scheme] = save_quantized(quantize(make(dtype=torch.bfloat16), scheme), tmp_path / scheme).stat().st_size
    assert sizes["nf4"] < sizes["int8"] < sizes["bf16"]


@pytest.mark.parametrize("model", [CLIPTextModel(TINY_CLIP), AutoencoderKL(TINY_VAE)], ids=lambda model: type(model).__name__)
def test_clip_and_autoencoder_stay(model):
    with pytest.raises(ValueError, match=rf"model: {type(model).__name__} stays as it is"):
        quantize(model, "int8")


def test_clear_errors_of_quantize():
    with pytest.raises(ValueError, match=r"scheme: expected one of \['int8', 'nf4'\], got 'int4'"):
        quantize(make(), "int4")
    with pytest.raises(ValueError, match=r"backend: expected one of \['flux_lab', 'bitsandbytes'\], got 'gptq'"):
        quantize(make(), "int8", backend="gptq")
    with pytest.raises(ValueError, match=r"no nn\.Linear to quantize, or is quantized already"):
        quantize(quantize(make(), "int8"), "nf4")
    broken = make()
    broken.proj_out.weight[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"proj_out\.weight: expected finite numbers"):
        quantize(broken, "int8")


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:77'"):
        quantize(make(), "int8", device="cuda:77")
    save_quantized(quantize(make(), "int8"), tmp_path)
    with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:77'"):
        load_quantized(tmp_path, device="cuda:77")


def test_clear_errors_of_save_and_load(tmp_path):
    with pytest.raises(ValueError, match="got FluxTransformer2DModel, not quantized"):
        save_quantized(make(), tmp_path / "plain")
    with pytest.raises(TypeError, match=r"model: expected one of \['FluxTransformer2DModel', 'T5EncoderModel'\], got Sequential"):
        save_quantized(quantize(nn.Sequential(nn.Linear(3, 4)), "int8"), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"config.json and the weights of a quantized transformer or T5, found no such files"):
        load_quantized(tmp_path)
    assert not any(tmp_path.iterdir())

    file = save_quantized(quantize(make(), "int8"), tmp_path)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors: expected weights quantized as nf4, found int8"):
        load_quantized(tmp_path, "nf4")
    with pytest.raises(CheckpointError, match="I8, which is not supported"):
        load_transformer(tmp_path)

    tensors = load_file(file)
    bad = {
        "proj_out.absmax": (torch.zeros(5), r"key 'proj_out.absmax': expected shape \(64,\), found \(5,\)"),
        "more": (torch.zeros(5), r"key 'more': expected shape of nothing, found \(5,\)"),
        "proj_out.weight": (None, r"key 'proj_out.weight': expected shape \(64, 32\), found nothing"),
    }
    for key, (tensor, message) in bad.items():
        changed = {name: value for name, value in (tensors | {key: tensor}).items() if value is not None}
        save_file(changed, file, metadata={"quantization": "int8"})
        with pytest.raises(CheckpointError, match=message):
            load_quantized(tmp_path)
    save_file(tensors, file, metadata={"quantization": "int3"})
    with pytest.raises(CheckpointError, match="key 'quantization': expected weights quantized as int8 or nf4, found int3"):
        load_quantized(tmp_path)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="expected weights quantized as int8 or nf4, found weights that are not quantized"):
        load_quantized(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="a whole safetensors file"):
        load_quantized(tmp_path)


def hoisted():
    return hoist(make(), [conditioning_of(make_inputs(TINY))])


def mixed():
    model = quantize(make(), "int8")
    model.proj_out = SCHEMES["nf4"].from_linear(make().proj_out)
    return model


INSTEAD = "a quantized model is written by save_quantized, all of it in one scheme; of a hoisted one, save the original"


@pytest.mark.parametrize(
    ("save", "change", "found"),
    [
        (save_model, lambda: quantize(make(), "int8"), r"weight: expected float \[.*\], got torch\.int8 \[.*\]"),
        (save_model, lambda: quantize(make(), "nf4"), r"weight: expected float \[.*\], got torch\.uint8 \[.*\]"),
        (save_model, lambda: quantize(make("t5"), "int8"), r"weight: expected float \[.*\], got torch\.int8 \[.*\]"),
        (save_model, hoisted, r"time_text_embed\..*: expected float \[.*\], got nothing"),
        (save_quantized, lambda: quantize(hoisted(), "int8"), r"time_text_embed\..*: expected .*, got nothing"),
        (save_quantized, mixed, r"expected .*, got .*"),
    ],
    ids=["int8", "nf4", "t5", "hoisted", "hoisted int8", "two schemes"],
)
def test_what_no_reader_could_take_is_not_written(save, change, found, tmp_path):
    save_model(make(), tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    for name in ("old", "new"):
        with pytest.raises(ValueError, match=f"model: .*{found}: {INSTEAD}"):
            save(change(), tmp_path / name)
    assert [folder.name for folder in tmp_path.iterdir()] == ["old"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before


def test_a_sharded_checkpoint_is_not_overlaid(tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected a folder without a sharded checkpoint"):
        save_quantized(quantize(make(), "int8"), tmp_path)


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_leaves_no_partial_file(when, tmp_path, monkeypatch):
    save_quantized(quantize(make(), "int8"), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if when == "before":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:

        def save_half(tensors, file, metadata):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

        monkeypatch.setattr(checkpoints, "save_file", save_half)
    with pytest.raises(OSError, match=r"expected 0\.0 GB of free disk, found 0\.0 GB|No space left on device"):
        save_quantized(quantize(make(), "nf4"), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_whole_pipeline(tmp_path, monkeypatch):
    source = data_dir() / "flux-mini"
    quantize_checkpoint(source, tmp_path / "small", "nf4", torch.bfloat16)
    names = {file.relative_to(source) for file in source.rglob("*")}
    assert {file.relative_to(tmp_path / "small") for file in (tmp_path / "small").rglob("*")} == names
    assert scheme_of(load_quantized(tmp_path / "small" / "text_encoder_2")) == "nf4"
    with pytest.raises(ValueError, match="folder: expected a name that is not taken"):
        quantize_checkpoint(source, tmp_path / "small", "int8")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantization, "save_quantized", fail)
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(source, tmp_path / "other", "int8")
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
