"""flux_lab.inference.random_checkpoint: what it writes is a checkpoint."""

import errno
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flux_lab.config import TINY
from flux_lab.inference.full_size import make_inputs, read_config
from flux_lab.inference.loading import load_lean
from flux_lab.inference.quantization import SCHEMES
from flux_lab.inference.random_checkpoint import STD, _draw, _normal, write_random


def test_numbers_are_normal():
    numbers = _draw(np.random.default_rng(0), torch.Size([300, 1000]), _normal(torch.bfloat16)).float()
    assert numbers.mean() == pytest.approx(0, abs=1e-4)
    shares = [(numbers.abs() < width * STD).float().mean().item() for width in (1, 2, 3)]
    assert shares == pytest.approx([0.683, 0.954, 0.997], abs=0.004)


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_random(tmp_path, TINY, None)
    assert not any(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"expected 0\.0 GB of free disk, found 0\.0 GB"):
        write_random(tmp_path, TINY, None)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_the_checkpoint_is_one(scheme, tmp_path):
    file = write_random(tmp_path, TINY, scheme)
    assert len(load_file(file)) > 100, "safetensors itself reads it"
    assert read_config(tmp_path) == TINY
    inputs = make_inputs(TINY, size=48, length=7, device="cpu")
    given = load_lean(tmp_path)(**inputs)
    assert given.shape == (1, 9, 64)
    assert given.isfinite().all()
    weight = load_lean(tmp_path).x_embedder
    weight = weight.weight if scheme is None else weight.dequantized()
    assert weight.float().std() == pytest.approx(0.02, rel=0.1)
