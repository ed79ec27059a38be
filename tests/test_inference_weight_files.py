"""flux_lab.inference.weight_files: the tensors that safetensors itself reads, mapped."""

import errno
import gc
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from flux_lab.checkpoints import T5, CheckpointError
from flux_lab.inference import weight_files
from flux_lab.inference.weight_files import PAGE, WeightFiles, read_header, spans_of


def make(folder):
    tensors = {
        "b.wo.weight": torch.randn(70, 33),
        "a.weight": torch.randn(3, 5, 7).bfloat16(),
        "a.absmax": torch.randn(9),
        "codes": torch.randint(-127, 128, (11, 13), dtype=torch.int8),
        "bytes": torch.randint(0, 256, (10001,), dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
    }
    files = {name: f"model-0000{1 if index < 2 else 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, metadata={"format": "pt"})
    write_index(folder, files)
    return tensors


def write_index(folder, files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_same_as_safetensors(tmp_path):
    tensors = make(tmp_path)
    files = WeightFiles(T5, tmp_path)
    assert set(files) == set(tensors)
    assert len(files) == len(tensors)
    read = files.read(tensors)
    for name, tensor in tensors.items():
        for given in (files[name], read[name]):
            assert given.dtype == tensor.dtype
            assert torch.equal(given, tensor), name
        assert files.empty(name).shape == tensor.shape
        assert files.empty(name).is_meta


def test_asking_for_a_name_reads_nothing(tmp_path, monkeypatch):
    tensors = make(tmp_path)
    files = WeightFiles(T5, tmp_path, torch.float16)
    monkeypatch.setattr(weight_files, "_map", lambda entry: pytest.fail(f"read {entry}"))
    assert all(name in files for name in tensors)
    assert "weight" not in files


def test_only_what_the_index_names(tmp_path):
    """Of each file only its own, and no other file: a backup, or the same weights in another dtype."""
    tensors = make(tmp_path)
    for stray in ("model.fp16-00001-of-00001.safetensors", "old.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()} | {"more": torch.zeros(2)}, tmp_path / stray)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({name: tensors[name] for name in ("b.wo.weight", "a.weight")} | {"codes": torch.zeros(2)}, tmp_path / first)
    read = WeightFiles(T5, tmp_path).read(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert "more" not in WeightFiles(T5, tmp_path)
    write_index(tmp_path, {"none": first})
    with pytest.raises(CheckpointError, match=f"{first}: key 'none': expected a tensor, which the index says is here, found nothing"):
        WeightFiles(T5, tmp_path)
    (tmp_path / second).unlink()
    write_index(tmp_path, {"codes": second})
    with pytest.raises(CheckpointError, match=f"{second}: expected a safetensors file, found nothing"):
        WeightFiles(T5, tmp_path)


def test_only_weights_are_cast(tmp_path):
    tensors = make(tmp_path)
    read = WeightFiles(T5, tmp_path, torch.float16).read(tensors)
    assert read["a.weight"].dtype == torch.float16
    assert read["b.wo.weight"].dtype == torch.float32, "too large for fp16"
    assert read["a.absmax"].dtype == torch.float32
    assert read["codes"].dtype == torch.int8
    assert torch.equal(read["a.weight"], tensors["a.weight"].half())


def test_the_file_cannot_be_changed_through_a_tensor(tmp_path):
    tensors = make(tmp_path)
    WeightFiles(T5, tmp_path)["codes"].zero_()
    assert torch.equal(WeightFiles(T5, tmp_path)["codes"], tensors["codes"])


@pytest.mark.parametrize("cast", [None, torch.float16], ids=str)
def test_copies_are_the_same(cast, tmp_path):
    make(tmp_path)
    files = WeightFiles(T5, tmp_path, cast)
    copies, mapped = files.copy(files), files.read(files)
    for name, tensor in mapped.items():
        assert copies[name].dtype == tensor.dtype
        assert torch.equal(copies[name], tensor), name
    assert torch.equal(files.copy(["codes"])["codes"], mapped["codes"])
    assert files.copy([]) == {}


def test_memory_is_used_again_when_the_last_tensor_is_gone(tmp_path):
    make(tmp_path)
    files = WeightFiles(T5, tmp_path)
    first = files.copy(["codes", "bytes"])
    kept = first["codes"][3:]
    place, numbers = kept.data_ptr(), kept.clone()
    del first
    assert files.copy(["codes"])["codes"][3:].data_ptr() != place, "a view keeps it"
    assert torch.equal(kept, numbers)
    del kept
    assert files.copy(["codes", "bytes"])["codes"][3:].data_ptr() == place


def test_few_pieces_are_read(tmp_path):
    make(tmp_path)
    entries = {name: WeightFiles(T5, tmp_path)._entries[name] for name in ("b.wo.weight", "codes", "bytes")}
    spans = spans_of(entries.values())
    assert [len(span.entries) for span in spans] == [1, 2]
    assert all(span.start % PAGE == span.size % PAGE == 0 for span in spans)


def test_where_the_cache_cannot_be_passed(tmp_path, monkeypatch):
    tensors = make(tmp_path)

    def refuse(path, flags):
        raise OSError(errno.EINVAL, "Invalid argument", path)

    monkeypatch.setattr(os, "open", refuse)
    assert torch.equal(WeightFiles(T5, tmp_path).copy(["codes"])["codes"], tensors["codes"])


def test_a_file_that_gets_shorter(tmp_path):
    make(tmp_path)
    files = WeightFiles(T5, tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="truncated since it was opened"):
        files.copy(files)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux' list of mappings")
def test_a_mapping_goes_with_its_tensor(tmp_path):
    make(tmp_path)

    def mappings():
        gc.collect()
        with open("/proc/self/maps") as maps:
            return sum(str(tmp_path) in line for line in maps)

    tensor = WeightFiles(T5, tmp_path)["codes"][2:]
    assert mappings() == 1
    del tensor
    assert mappings() == 0


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or model\.safetensors\.index\.json, found an empty folder"):
        WeightFiles(T5, tmp_path)
    make(tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    for length, message in [(len(whole) - 10, "truncated or corrupt"), (50, "a safetensors file"), (3, "a safetensors file")]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"{file.name}.*{message}"):
            WeightFiles(T5, tmp_path)
    save_file({"a": torch.zeros(2, dtype=torch.float64)}, file)
    with pytest.raises(CheckpointError, match=r"a safetensors file with numbers as F32.*found something else \(KeyError\('F64'\)\)"):
        read_header(file)
