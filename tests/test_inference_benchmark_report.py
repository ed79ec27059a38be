"""flux_lab.inference.benchmark_report: the table and the figure of a file that the benchmark has written."""

import pytest
import torch

from flux_lab.inference.benchmark import report
from flux_lab.inference.benchmark_cases import CASES, FAST, OURS, REFERENCE, Case, Settings
from flux_lab.inference.benchmark_report import HEADER, by_case, markdown, ratios, read, rows, write_figure


@pytest.fixture
def held(tmp_path, monkeypatch):
    """Two cases: a product, and one of which nothing is counted."""
    left, right = torch.randn(8, 9), torch.randn(9, 10)
    sides = {side: lambda: left @ right for side in (REFERENCE, OURS, FAST)}
    cases = [Case("product", sides, weights=[]), Case("import", sides, weights=[], counted=False)]
    monkeypatch.setitem(CASES, "both", lambda settings: iter(cases))
    report(["both"], Settings(repeats=2, product=16), tmp_path / "bench.json")
    return read(tmp_path / "bench.json")


def test_results_by_case_and_side(held):
    assert [list(case) for case in by_case(held).values()] == [[REFERENCE, OURS, FAST]] * 2
    found = ratios(held)
    assert list(found["product"]) == [OURS, FAST]
    median, low, high = found["product"][FAST]
    assert low <= median <= high


def test_table(held):
    product, imported = (dict(zip(HEADER, row, strict=True)) for row in rows(held))
    assert (product["case"], product["rounds"], product["peak memory, fast"]) == ("product", "2", "1.00")
    assert product["fast compiled"] == ""
    assert product["of the product rate, fast"].endswith("%")
    assert 0 < float(product["its products alone"]) <= float(product["fast"]) + 0.01
    assert imported["its products alone"] == ""
    assert imported["peak memory, fast"] == imported["of the product rate, fast"] == ""
    first, _, header, marks, *lines = markdown(held).splitlines()
    assert "below 1 is faster" in first
    assert "torch" in first
    assert {line.count("|") for line in (header, marks, *lines)} == {len(HEADER) + 1}


def test_figure(held, tmp_path):
    assert write_figure(tmp_path / "bench.json").read_bytes().startswith(b"\x89PNG")
