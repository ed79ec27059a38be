"""The table of parity: every row is within its bound in every dtype, and says so when something is wrong."""

import json
from pathlib import Path

import pytest
import torch

from flux_lab.instruments import parity
from flux_lab.instruments.parity import DTYPES, bundled, measure
from flux_lab.instruments.parity_cases import Case, Pair, cases, close

CASES = {case.name: case for case in cases(bundled())}
QUICK = {name: case for name, case in CASES.items() if name not in ("transformer, 57 blocks", "whole pipeline, 8-bit")}
SLOW = {name: case for name, case in CASES.items() if name not in QUICK}


def made_of(ours: torch.Tensor, reference: torch.Tensor, name: str = "made up") -> Case:
    return Case(name, "nowhere.py", "nothing", lambda dtype: Pair([ours.to(dtype)], [reference.to(dtype)]), close)


def assert_row_within_its_bound(case: Case) -> None:
    results = {str(dtype): measure(case, dtype) for dtype in case.dtypes}
    assert {dtype: result for dtype, result in results.items() if not result.within} == {}


@pytest.mark.parametrize("name", QUICK)
def test_row_is_within_its_bound(name: str) -> None:
    assert_row_within_its_bound(QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_long_row_is_within_its_bound(name: str) -> None:
    assert_row_within_its_bound(SLOW[name])


def test_every_module_of_the_model_has_a_row() -> None:
    """Of the core only these have no counterpart: configurations, shape checks, files, and what the whole pipeline covers."""
    core = {path.name for path in Path(parity.__file__).parents[1].glob("[!_]*.py")}
    without = {"files.py", "config.py", "shapes.py", "checkpoints.py", "original_layout.py", "prompt.py", "tokenizer.py"}
    without |= {"sentencepiece_model.py"}
    assert {case.file for case in cases(Path())} == core - without


@pytest.mark.parametrize(
    ("dtype", "difference", "within"),
    [
        (torch.float32, 0.0, True),
        (torch.float32, 1e-5, True),
        (torch.float32, 3e-5, False),
        (torch.bfloat16, 2.0**-6, True),
        (torch.bfloat16, 2.0**-5, False),
        (torch.float16, 2.0**-9, True),
        (torch.float16, 2.0**-8, False),
        (torch.float32, float("nan"), False),
    ],
)
def test_bound(dtype: torch.dtype, difference: float, within: bool) -> None:
    result = measure(made_of(torch.ones(3) + difference, torch.ones(3)), dtype)
    assert result.within is within
    assert result.equal is (difference == 0)
    assert result.largest == pytest.approx(difference, rel=1e-2, nan_ok=True)


@pytest.mark.parametrize("ours", [torch.ones(4), torch.ones(3, dtype=torch.float64)], ids=["shape", "dtype"])
def test_another_shape_or_dtype_is_out_of_bounds(ours: torch.Tensor) -> None:
    case = Case("", "", "", lambda dtype: Pair([ours], [torch.ones(3)]), close)
    assert measure(case, torch.float32) == (float("inf"), False, False)


def test_table_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, tokens = made_of(torch.ones(3), torch.ones(3), "good"), made_of(torch.ones(2), torch.ones(2), "tokens")
    monkeypatch.setattr(parity, "cases", lambda folder: [good, tokens._replace(dtypes=(torch.float32,))])
    assert parity.main(tmp_path, tmp_path / "table.json") == 0
    printed = capsys.readouterr().out
    assert "| good | `nowhere.py` | nothing | equal | equal | equal |\n" in printed
    assert "| tokens | `nowhere.py` | nothing | equal |  |  |\n" in printed
    written = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert [row["component"] for row in written["rows"]] == ["good", "tokens"]
    assert written["rows"][0]["results"].keys() == DTYPES.keys()
    assert written["rows"][1]["results"] == {"fp32": {"largest": 0.0, "equal": True, "within": True}}
    assert written["versions"].keys() == {"torch", "diffusers", "transformers"}
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_exit_code_when_a_bound_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(parity, "cases", lambda folder: [made_of(torch.ones(3), torch.full((3,), 1.5))])
    assert parity.main(tmp_path) == 1
    assert capsys.readouterr().out.count("5.0e-01 **out of bounds**") == 3


def test_without_a_checkpoint_the_table_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(parity, "bundled", lambda: None)
    monkeypatch.setattr(parity, "cases", lambda folder: [made_of(torch.ones(1), torch.ones(1), str(folder))])
    assert parity.main() == 0
    assert "miniature is missing" in capsys.readouterr().out
    assert {case.name for case in cases(None)} == {case.name for case in cases(Path())} - {
        "CLIP tokenizer",
        "T5 tokenizer",
        "whole pipeline, 8-bit",
    }
