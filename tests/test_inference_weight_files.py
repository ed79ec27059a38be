"""flux_lab.inference.weight_files: the tensors that safetensors itself reads, mapped."""

import gc
import os

import pytest
import torch
from safetensors.torch import save_file

from flux_lab.checkpoints import CheckpointError
from flux_lab.inference.weight_files import WeightFiles, read_header


def make(folder):
    tensors = {
        "b.wo.weight": torch.randn(70, 33),
        "a.weight": torch.randn(3, 5, 7).bfloat16(),
        "a.absmax": torch.randn(9),
        "codes": torch.randint(-127, 128, (11, 13), dtype=torch.int8),
        "bytes": torch.randint(0, 256, (10001,), dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
    }
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:2]}, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({name: tensors[name] for name in names[2:]}, folder / "model-00002-of-00002.safetensors")
    return tensors


def test_same_as_safetensors(tmp_path):
    tensors = make(tmp_path)
    files = WeightFiles(tmp_path)
    assert set(files) == set(tensors)
    assert len(files) == len(tensors)
    read = files.read(tensors)
    for name, tensor in tensors.items():
        for given in (files[name], read[name]):
            assert given.dtype == tensor.dtype
            assert torch.equal(given, tensor), name
        assert files.empty(name).shape == tensor.shape
        assert files.empty(name).is_meta


def test_only_weights_are_cast(tmp_path):
    tensors = make(tmp_path)
    read = WeightFiles(tmp_path, torch.float16).read(tensors)
    assert read["a.weight"].dtype == torch.float16
    assert read["b.wo.weight"].dtype == torch.float32, "too large for fp16"
    assert read["a.absmax"].dtype == torch.float32
    assert read["codes"].dtype == torch.int8
    assert torch.equal(read["a.weight"], tensors["a.weight"].half())


def test_the_file_cannot_be_changed_through_a_tensor(tmp_path):
    tensors = make(tmp_path)
    WeightFiles(tmp_path)["codes"].zero_()
    assert torch.equal(WeightFiles(tmp_path)["codes"], tensors["codes"])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux' list of mappings")
def test_a_mapping_goes_with_its_tensor(tmp_path):
    make(tmp_path)

    def mappings():
        gc.collect()
        with open("/proc/self/maps") as maps:
            return sum(str(tmp_path) in line for line in maps)

    tensor = WeightFiles(tmp_path)["codes"][2:]
    assert mappings() == 1
    del tensor
    assert mappings() == 0


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointError, match="expected a folder with safetensors files, found none"):
        WeightFiles(tmp_path)
    make(tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    for length, message in [(len(whole) - 10, "truncated or corrupt"), (50, "a safetensors file"), (3, "a safetensors file")]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"{file.name}.*{message}"):
            WeightFiles(tmp_path)
    save_file({"a": torch.zeros(2, dtype=torch.float64)}, file)
    with pytest.raises(CheckpointError, match=r"a safetensors file with numbers as F32.*found something else \(KeyError\('F64'\)\)"):
        read_header(file)
