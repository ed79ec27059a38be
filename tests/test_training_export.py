"""The exported folder: both our pipeline and diffusers' load it and draw the same picture, and misfits are refused."""

import dataclasses
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import randomize_
from diffusers import FluxPipeline as ReferencePipeline
from training_parts import write_parts

from flux_lab import FluxPipeline
from flux_lab.checkpoints import load_autoencoder, load_transformer, save_model
from flux_lab.config import TINY_T5
from flux_lab.t5 import T5EncoderModel
from flux_lab.training import export, schnell

FOLDERS = ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"]
CALL = {"prompt": "a small dark castle by the sea", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def exported(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "mini"
    export.export(**parts, out=out)
    return out


def test_the_folder_is_a_whole_checkpoint(exported):
    assert sorted(path.name for path in exported.iterdir()) == sorted([*FOLDERS, "SHA256SUMS", "model_index.json"])
    assert list(export.sizes(exported)) == FOLDERS
    assert min(export.sizes(exported).values()) > 0


def test_the_checksums_are_those_of_sha256sum(exported):
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=exported, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert len(checked.stdout.splitlines()) == 4


@pytest.fixture(scope="module")
def exported_schnell(parts, exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schnell")
    save_model(schnell.without_guidance(load_transformer(parts["transformer"]), schnell.GUIDANCE), folder / "transformer")
    for _ in range(2):  # the second time over the first one's links
        export.export(**parts | {"transformer": folder / "transformer"}, out=folder / "mini", share=exported)
    return folder / "mini"


def test_what_is_the_same_is_there_once(exported_schnell, exported):
    own = {path.parent.name for path in exported_schnell.glob("*/*") if not path.is_symlink()}
    assert own == {"scheduler", "transformer"}
    for path in exported_schnell.glob("*/*"):
        assert not path.is_symlink() or path.resolve() == (exported / path.parent.name / path.name).resolve()
    assert not any(path.is_symlink() for path in exported.glob("*/*"))


def test_a_link_is_not_written_through(exported_schnell, exported, parts, tmp_path):
    vae = randomize_(load_autoencoder(parts["vae"]))
    save_model(vae, tmp_path / "vae")
    before = {path: path.read_bytes() for path in exported.glob("*/*")}
    again = exported_schnell.with_name("again")
    shutil.copytree(exported_schnell, again, symlinks=True)
    (tmp_path / "tokenizers" / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(parts["tokenizers"] / name, tmp_path / "tokenizers" / name, dirs_exist_ok=True)
    (tmp_path / "tokenizers" / "tokenizer" / "tokenizer_config.json").open("a").write("\n")
    export.export(**parts | {"vae": tmp_path / "vae", "tokenizers": tmp_path / "tokenizers"}, out=again, share=exported)
    assert {path: path.read_bytes() for path in exported.glob("*/*")} == before
    assert not any(path.is_symlink() for name in ("vae", "tokenizer") for path in (again / name).iterdir())
    assert all(path.is_symlink() for path in (again / "text_encoder").iterdir())


@pytest.mark.parametrize(("folder", "shifts"), [("exported", True), ("exported_schnell", False)])
def test_diffusers_loads_it_and_draws_the_same_picture(folder, shifts, request):
    pictures = []
    for pipeline in (FluxPipeline, ReferencePipeline):
        pipe = pipeline.from_pretrained(request.getfixturevalue(folder))
        assert pipe.scheduler.config.use_dynamic_shifting == pipe.transformer.config.guidance_embeds == shifts
        pipe.set_progress_bar_config(disable=True)
        call = CALL if pipeline is FluxPipeline else CALL | {"height": 128, "width": 128, "max_sequence_length": 32}
        pictures.append(np.asarray(pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]).astype(int))
    assert pictures[0].shape == (128, 128, 3)
    assert pictures[0].std() > 5
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize(
    ("part", "load", "dtype"), [("transformer", load_transformer, torch.bfloat16), ("vae", load_autoencoder, torch.float16)]
)
def test_numbers_are_the_trained_ones_rounded(part, load, dtype, parts, exported):
    trained, written = load(parts[part]), load(exported / part)
    assert written.config == trained.config
    expected = trained.state_dict()
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_the_command_writes_where_it_is_told(parts, tmp_path, capsys):
    options = [word for name, folder in parts.items() for word in (f"--{name}", str(folder))]
    export.main([*options, "--out", str(tmp_path / "mini"), "--dtype", "float32", "--vae-dtype", "float32"])
    assert torch.equal(
        load_transformer(tmp_path / "mini").state_dict()["proj_out.weight"],
        load_transformer(parts["transformer"]).state_dict()["proj_out.weight"],
    )
    assert "2 + 3 blocks, loaded and drawn from" in capsys.readouterr().out


def test_parts_of_other_widths_are_refused(parts, tmp_path, capsys):
    wide = dataclasses.replace(TINY_T5, d_model=28)
    save_model(T5EncoderModel(wide), tmp_path / "t5")
    message = "the transformer has joint_attention_dim=24, but T5's d_model is 28: not trained together"
    with pytest.raises(ValueError, match=message):
        export.export(**(parts | {"t5": tmp_path / "t5"}), out=tmp_path / "mini")
    assert not (tmp_path / "mini").exists()
    options = [word for name, folder in (parts | {"t5": tmp_path / "t5"}).items() for word in (f"--{name}", str(folder))]
    with pytest.raises(SystemExit) as stopped:
        export.main([*options, "--out", str(tmp_path / "mini")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_numbers_too_large_for_the_dtype_are_refused(parts, tmp_path):
    vae = randomize_(load_autoencoder(parts["vae"]))
    vae.decoder.conv_out.bias[0] = 1e5
    save_model(vae, tmp_path / "vae")
    with pytest.raises(ValueError, match=r"vae: decoder\.conv_out\.bias has numbers that are not finite in torch\.float16"):
        export.export(**(parts | {"vae": tmp_path / "vae"}), out=tmp_path / "mini")
    assert not (tmp_path / "mini").exists()
