"""The training loop: a run that is killed and resumed ends with the same parameters as one that was not."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from flux_lab.training.loop import Settings, load_trained, train
from flux_lab.training.optimizer import is_inner_matrix, optimizers_of

SETTINGS = Settings(steps=7, batch_size=4, learning_rate=0.01, warmup=2, ema=0.9, save_every=3)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)

    def forward(self, x):
        return {"loss": self.conv(x).square().mean(), "largest": x.max()}


def batch(step, generator):
    return {"x": torch.randn(4, 2, 5, 5, generator=generator)}


def run(out, make_batch=batch, settings=SETTINGS):
    torch.manual_seed(0)
    return train(Line(), make_batch, out, settings)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    expected = run(tmp_path / "whole")

    def killed(step, generator):
        if step == 5:
            raise KeyboardInterrupt
        return batch(step, generator)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed)
    resumed = run(tmp_path / "killed")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == SETTINGS.steps


class Blocks(nn.Module):
    """A matrix inside a block, one outside, and a vector."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Linear(5, 4)])
        self.proj_out = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return {"loss": (self.proj_out(self.transformer_blocks[0](x)) - x[..., :3]).square().mean()}


def test_muon_moves_the_matrices_inside_blocks_and_is_resumed_too(tmp_path):
    settings = dataclasses.replace(SETTINGS, muon=3.0)
    task = Blocks()
    parameters = dict(task.named_parameters())
    assert [name for name, parameter in parameters.items() if is_inner_matrix(name, parameter)] == ["transformer_blocks.0.weight"]
    kinds = {type(optimizer): multiple for optimizer, multiple in optimizers_of(parameters, 0.0, settings.muon).items()}
    assert kinds == {torch.optim.AdamW: 1.0, torch.optim.Muon: 3.0}

    def run_blocks(out, steps):
        torch.manual_seed(0)
        return train(Blocks(), batch, out, dataclasses.replace(settings, steps=steps, decay=0.0, save_every=1))

    before = {name: tensor.clone() for name, tensor in run_blocks(tmp_path / "start", 0).items()}
    whole = run_blocks(tmp_path / "whole", 6)
    moved = whole["transformer_blocks.0.weight"] - before["transformer_blocks.0.weight"]
    # An orthogonal step moves all directions: no singular value stays behind, as it would when one gradient dominates.
    singular = torch.linalg.svdvals(moved)
    assert singular[-1] > 0.2 * singular[0]
    run_blocks(tmp_path / "resumed", 3)
    resumed = run_blocks(tmp_path / "resumed", 6)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_average_is_what_is_loaded(tmp_path):
    expected = run(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_trained(tmp_path).items())


def test_checkpoints_are_kept(tmp_path):
    settings = dataclasses.replace(SETTINGS, decay=0.0, keep_every=3)
    run(tmp_path / "whole", settings=settings)
    assert sorted(file.name for file in (tmp_path / "whole" / "kept").iterdir()) == ["000003.safetensors", "000006.safetensors"]
    expected = run(tmp_path / "half", settings=dataclasses.replace(settings, steps=3))
    found = load_trained(tmp_path / "whole", checkpoint="kept/000003.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_settings_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with batch_size=4, asked for 8"):
        run(tmp_path, settings=Settings(steps=7, batch_size=8, learning_rate=0.01, warmup=2, ema=0.9, save_every=3))


def test_nothing_trained_yet(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.safetensors: not there; run the stage"):
        load_trained(tmp_path)


def test_the_rate_warms_up_stays_and_falls_to_zero():
    settings = Settings(steps=100, batch_size=1, learning_rate=1.0, warmup=10, decay=0.5)
    assert [settings.rate(step) for step in (0, 4, 9, 30, 50)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert settings.rate(75) == pytest.approx(0.5)
    assert settings.rate(99) == pytest.approx(0.02)


SHARED_RUN = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_loop
out = Path(sys.argv[1])
test_loop.run(out)
(out / ("rank" + os.environ["RANK"])).touch()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SHARED_RUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path / "two")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(launch, check=True, capture_output=True, timeout=300, cwd=Path(__file__).parent.parent, env=environment)
    assert sorted(path.name for path in (tmp_path / "two").glob("rank*")) == ["rank0", "rank1"]
    run(tmp_path / "one")
    one, two = (load_trained(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
