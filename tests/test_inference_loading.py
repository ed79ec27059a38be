"""flux_lab.inference.loading: one tensor at a time, and the same model as the plain loader's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_inference_hoisting import conditioning_of
from test_inference_streaming import EVERY_MODEL, inputs_of, make
from test_transformer import make_inputs

from flux_lab.checkpoints import CheckpointError, load_t5, load_transformer, save_model
from flux_lab.config import TINY
from flux_lab.inference.live_bytes import LiveBytes, bytes_of
from flux_lab.inference.loading import folder_scheme, load_lean
from flux_lab.inference.quantization import SCHEMES, quantize, save_quantized
from flux_lab.inference.streaming import streamed


@EVERY_MODEL
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_on_the_way(name, scheme, tmp_path):
    model, inputs = make(name), inputs_of(name)
    save_model(model, tmp_path / "plain")
    save_quantized(quantize(model, scheme), tmp_path / "quantized")
    exact = model(**inputs)
    assert torch.equal(load_lean(tmp_path / "plain", scheme)(**inputs), exact)
    assert torch.equal(load_lean(tmp_path / "quantized")(**inputs), exact)
    other = next(each for each in SCHEMES if each != scheme)
    with pytest.raises(CheckpointError, match=f"expected weights quantized as {other}, found {scheme}"):
        load_lean(tmp_path / "quantized", other)


def test_never_more_than_the_model_and_one_layer(tmp_path):
    save_model(make(), tmp_path)
    largest = max(parameter.nbytes for parameter in make().parameters())
    with LiveBytes() as live:
        model = load_lean(tmp_path, "nf4")
    assert live.peak < bytes_of(model) + 6 * largest < bytes_of(make())


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_hoisted_on_the_way(scheme, tmp_path):
    model, inputs = make(), make_inputs(TINY)
    save_model(model, tmp_path)
    exact = model(**inputs)
    given = load_lean(tmp_path, scheme, conditionings=[conditioning_of(inputs)])(**inputs)
    assert torch.equal(given, exact) if scheme is None else (given - exact).norm() < 0.5 * exact.norm()


@EVERY_MODEL
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_cast_as_the_plain_loader_does(name, dtype, tmp_path):
    save_model(make(name), tmp_path)
    plain = {"transformer": load_transformer, "t5": load_t5}[name](tmp_path, dtype).requires_grad_(False)
    lean = load_lean(tmp_path, dtype=dtype)
    assert lean.state_dict().keys() == plain.state_dict().keys()
    for key, tensor in plain.state_dict().items():
        assert lean.state_dict()[key].dtype == tensor.dtype, key
        assert torch.equal(lean.state_dict()[key], tensor), key
    inputs = {key: value.to(dtype or torch.float32) if value.is_floating_point() else value for key, value in inputs_of(name).items()}
    with streamed(tmp_path, dtype=dtype) as ready:
        assert torch.equal(ready(**inputs), plain(**inputs))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_other_files_of_the_folder_are_not_read(sharded, tmp_path):
    """A backup, a variant of the same weights, and one that is quantized."""
    model, inputs = make(), make_inputs(TINY)
    save_model(model, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if sharded:
        names = {name: f"{file.stem}-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
        for shard in set(names.values()):
            save_file({name: tensor for name, tensor in tensors.items() if names[name] == shard}, tmp_path / shard)
        file.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        file.unlink()
    for stray in ("a.safetensors", f"{file.stem}.fp16.safetensors", "old.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / stray)
    save_quantized(quantize(make(), "int8"), tmp_path / "quantized").rename(tmp_path / "quantized.safetensors")
    exact = model(**inputs)
    assert torch.equal(load_transformer(tmp_path).requires_grad_(False)(**inputs), exact)
    assert folder_scheme(tmp_path) is None
    assert torch.equal(load_lean(tmp_path)(**inputs), exact)
    with streamed(tmp_path) as ready:
        assert torch.equal(ready(**inputs), exact)


def test_the_other_name_of_a_shared_tensor(tmp_path):
    """T5's token embedding is stored under either of its two names."""
    model, inputs = make("t5"), inputs_of("t5")
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, file)
    exact = model(**inputs)
    assert torch.equal(load_t5(tmp_path).requires_grad_(False)(**inputs), exact)
    assert torch.equal(load_lean(tmp_path)(**inputs), exact)
    with streamed(tmp_path) as ready:
        assert torch.equal(ready(**inputs), exact)


def test_clear_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json and safetensors files of a transformer or T5, found no such files"):
        load_lean(tmp_path)
    save_model(make(), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for changed, message in [
        (tensors | {"proj_out.bias": torch.zeros(3)}, r"key 'proj_out.bias': expected shape \(64,\), found \(3,\)"),
        ({key: tensor for key, tensor in tensors.items() if key != "proj_out.bias"}, r"expected shape \(64,\), found nothing"),
    ]:
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=message):
            load_lean(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match=r"expected one of \['FluxTransformer2DModel', 'T5EncoderModel'\], found \['AutoencoderKL'\]"):
        load_lean(tmp_path)
