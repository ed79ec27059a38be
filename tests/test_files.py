"""A file is either the old one or the new one, never half of one."""

import os

import pytest
import torch
from safetensors.torch import save_file

from flux_lab.files import replacing, write_text


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path):
    file = tmp_path / "notes.txt"
    write_text(file, "old")
    write_text(file, "new, with an ü")
    assert file.read_bytes() == "new, with an ü".encode()
    assert os.listdir(tmp_path) == ["notes.txt"]


def fails_half_way(file, error):
    with replacing(file) as temporary:
        temporary.write_text("half of the n")
        assert temporary.parent == file.parent
        raise error("broken off")


def fails_in_a_folder(folder):
    with replacing(folder) as temporary:
        temporary.mkdir()
        raise ValueError("broken off")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    file = tmp_path / "notes.txt"
    file.write_text("old")
    with pytest.raises(error, match="broken off"):
        fails_half_way(file, error)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "weights").read_text() == "1"
    with pytest.raises(ValueError, match="broken off"):
        fails_in_a_folder(tmp_path / "other")
    assert os.listdir(tmp_path) == ["model"]


def test_what_safetensors_cannot_write_is_an_os_error_that_names_the_file(tmp_path):
    file = tmp_path / "missing" / "weights.safetensors"
    with pytest.raises(OSError, match=r"weights\.safetensors"), replacing(file) as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
