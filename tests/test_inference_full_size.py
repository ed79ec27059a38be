"""flux_lab.inference.full_size: the whole experiment at a size that takes seconds."""

import json

import pytest
import torch

from flux_lab.config import TINY
from flux_lab.inference.full_size import main, make_inputs, seconds_of_products


def test_products_are_timed():
    assert 0 < seconds_of_products(TINY, make_inputs(TINY, size=32, length=5, device="cpu"), "int8", "cpu") < 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")
def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="device: expected one that is here"):
        main(["--folder", str(tmp_path), "--device", "cuda"])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    options = ["--model", "mini", "--blocks", "1", "2", "--size", "64", "--length", "8", "--steps", "2", "--limit", "6GB"]
    assert main(["--folder", str(tmp_path / "checkpoint"), *options, "--json", str(tmp_path / "result.json")]) == 0
    assert main(["--folder", str(tmp_path / "checkpoint"), *options, "--json", str(tmp_path / "result.json")]) == 0
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert result["finite"]
    assert len(result["steps"]) == 2
    assert 0 < result["resident"] < 6e9
    assert result["limit_by"] in ("a control group", "RLIMIT_AS")
    assert result["blocks"] == [1, 2]
    assert "times the larger" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--folder: .* holds another checkpoint"):
        main(["--folder", str(tmp_path / "checkpoint"), "--model", "mini", "--scheme", "nf4"])
    assert torch.get_default_dtype() == torch.float32
