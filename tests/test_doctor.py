"""The doctor's report: what is in it, what must not be, and its verdicts."""

import getpass
import hashlib
import re
from pathlib import Path

import pytest
import torch

from flux_lab import __version__
from flux_lab.inference.memory import plan
from flux_lab.instruments import doctor
from flux_lab.instruments.doctor import GIB, Device, Need, checksums, needs, report, shorten, verdict


@pytest.fixture(scope="module")
def text() -> str:
    return report()


def test_report_has_all_sections(text: str) -> None:
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert titles == [f"flux_lab {__version__}", "Hardware", "Bundled miniature", "What fits into memory"]


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_report_names_versions(text: str, package: str) -> None:
    assert re.search(rf"\b{package} [0-9]+\.[0-9]+", text)


def test_report_names_no_home_and_no_user(text: str) -> None:
    assert str(Path.home()) + "/" not in text
    assert str(Path(doctor.__file__).parents[2]) not in text
    assert not re.search(rf"[/\\]{re.escape(getpass.getuser())}\b", text)


def test_report_is_plain_text_of_modest_width(text: str) -> None:
    assert text.isascii()
    assert max(len(line) for line in text.splitlines()) <= 140


def test_shorten() -> None:
    root = Path(doctor.__file__).resolve().parents[2]
    assert shorten(f"{root}/data/x: expected") == ".../data/x: expected"
    assert shorten(f"{Path.home()}/models/y") == "~/models/y"


def test_missing_miniature_is_said_not_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "data_dir", lambda: tmp_path)
    (line,) = doctor.miniature()
    assert line.startswith("NOT USABLE: ")


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 16), ("8-bit", 8), ("4-bit", 4)])
def test_needs_of_flux_are_the_planners(name: str, bits: int) -> None:
    """To the byte: every parameter, T5's `wo` as it is, scales of rows, of blocks and of blocks of blocks."""
    planned = plan("dev", bits=bits, hoisted=False)
    found = {need.name: need for need in needs()}[f"FLUX.1-dev, {name}"]
    assert found.whole == sum(stage.weights for stage in planned.stages)
    assert found.largest == planned["denoise"].weights


def test_needs_of_the_miniature_are_the_planners() -> None:
    planned = plan("mini", bits=32, hoisted=False)
    assert needs()[0].whole == sum(stage.weights for stage in planned.stages) < GIB / 8


@pytest.mark.parametrize(("memory", "expected"), [(40, "yes"), (34, "yes"), (33, "by parts"), (25, "by parts"), (24, "no")])
def test_verdict(memory: int, expected: str) -> None:
    assert verdict(Need("", whole=31 * GIB, largest=22 * GIB), memory * GIB) == expected


def test_every_device_has_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: [Device("cpu", "", 16 * GIB), Device("cuda:0", "", 80 * GIB)])
    header, *rows, _ = doctor.fits()
    assert header.split() == ["weights", "largest", "cpu", "cuda:0"]
    assert [row.split()[-1] for row in rows] == ["yes"] * 4
    assert rows[1].split()[-2] == "no"


def weights_in(folder: Path) -> list[Path]:
    file = folder / "vae" / "x.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"numbers")
    return [file]


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (None, "no SHA256SUMS to compare with"),
        (hashlib.sha256(b"numbers").hexdigest(), "ok"),
        ("0" * 64, "DIFFERS"),
    ],
)
def test_checksums(tmp_path: Path, published: str | None, expected: str) -> None:
    files = weights_in(tmp_path)
    if published:
        (tmp_path / "SHA256SUMS").write_text(f"{published}  vae/x.safetensors\n", encoding="utf-8")
    (line,) = checksums(tmp_path, files)
    assert line.endswith(f", {expected}")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    files = weights_in(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  transformer/y.safetensors\n", encoding="utf-8")
    assert list(checksums(tmp_path, files))[-1] == "transformer/y.safetensors: MISSING"


def test_threads_are_torchs(text: str) -> None:
    assert f"{torch.get_num_threads()} of torch" in text
