"""flux_lab.inference.random_checkpoint: what it writes is a checkpoint."""

import pytest
from safetensors.torch import load_file

from flux_lab.config import TINY
from flux_lab.inference.full_size import make_inputs, read_config
from flux_lab.inference.loading import load_lean
from flux_lab.inference.quantization import SCHEMES
from flux_lab.inference.random_checkpoint import write_random


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
