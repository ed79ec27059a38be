"""flux_lab.inference.benchmark: turns, ratios, the table and the file, on cases that take no time."""

import contextlib
import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from flux_lab import __main__ as command_line
from flux_lab.inference import benchmark
from flux_lab.inference.benchmark import HEADER, Spread, alternate, cells, counted, measure, memory_rate, product_rate, report, run, spread
from flux_lab.inference.benchmark_cases import CASES, FAST, OURS, REFERENCE, Case, Settings
from flux_lab.inference.fast_linear import FastLinear

SETTINGS = Settings(repeats=4, product=16)


@pytest.fixture
def case():
    """Two products in place of one on the reference's side; the fast side gives something else."""
    left, right = torch.randn(8, 9), torch.randn(9, 10)
    sides = {
        REFERENCE: lambda: (left @ right + left @ right) / 2,
        OURS: lambda: left @ right,
        FAST: lambda: 1.5 * (left @ right),
    }
    return Case("product", sides, weights=[])


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the calls move: `clock(side, seconds)` makes a call that takes as long."""
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def make(side, *seconds):
        left = list(seconds)

        def call():
            now[0] += left.pop(0)
            order.append(side)

        return call

    order = make.order = []
    return make


def test_spread():
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)


def test_sides_take_turns(clock):
    times = alternate({"a": clock("a", 1, 2, 3), "b": clock("b", 10, 20, 30)}, Settings(repeats=3))
    assert times == {"a": [1, 2, 3], "b": [10, 20, 30]}
    assert clock.order == ["a", "b", "b", "a", "a", "b"]


def test_a_long_case_is_repeated_three_times(clock):
    sides = {"a": clock("a", *[5] * 9), "b": clock("b", *[6] * 9)}
    assert [len(times) for times in alternate(sides, Settings(repeats=9, seconds=40)).values()] == [4, 4], (
        "the fifth would begin after 44 s"
    )
    assert [len(times) for times in alternate({"a": clock("a", *[50] * 9)}, Settings(repeats=9, seconds=40)).values()] == [3]


def test_ratio_is_taken_within_a_round(clock):
    """A machine that is ten times slower in one round changes no ratio."""
    seconds = {REFERENCE: (1, 1, 1, 10, 1), OURS: (1, 0.5, 0.5, 5, 0.5)}  # the first call warms up
    sides = {side: clock(side, *each) for side, each in seconds.items()}
    reference, ours = measure(Case("fake", sides, weights=[], counted=False), SETTINGS, rate=1.0)
    assert ours.ratio == Spread(0.5, 0.5, 0.5)
    assert reference.ratio == Spread(1, 1, 1)
    assert reference.seconds.median == 1
    assert (ours.error, ours.flops, ours.peak_bytes, ours.share) == (None, None, None, None)


def test_result_is_compared_and_work_counted(case):
    reference, ours, faster = measure(case, SETTINGS, rate=1e9)
    assert reference.error == 0
    assert ours.error < 1e-6
    assert faster.error == pytest.approx(0.5), "a side that gives something else is seen"
    assert (reference.flops, ours.flops) == (2 * 2 * 8 * 9 * 10, 2 * 8 * 9 * 10)
    assert ours.share == pytest.approx(reference.flops / ours.seconds.median / 1e9), "work is the reference's"
    assert reference.peak_bytes > ours.peak_bytes >= 4 * 8 * 10


def test_both_libraries_are_counted():
    for inputs, outputs in ((16, 32), (512, 1024)):  # F.linear, oneDNN where PyTorch has it
        layer = FastLinear(torch.nn.Linear(inputs, outputs, bias=False))
        _, flops, _ = counted(partial(layer, torch.randn(2, 5, inputs)), Case("layer", {}, weights=[]))
        assert flops == 2 * 2 * 5 * inputs * outputs
    assert benchmark.time_in_products(partial(layer, torch.ones(900, inputs))) > 0


@pytest.mark.parametrize("inference", [False, True])
def test_the_attention_product_is_counted(inference):
    def attend():
        with torch.inference_mode(inference):
            return torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 5, 8))

    _, flops, _ = counted(attend, Case("attention", {}, weights=[]))
    assert flops == 4 * 5 * 5 * 2 * 8


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (torch.matmul, [(6, 7), (7, 5)]),
        (torch.matmul, [(3, 6, 7), (3, 7, 5)]),
        (torch.nn.functional.linear, [(6, 7), (5, 7), (5,)]),
        (torch.nn.functional.conv2d, [(1, 3, 64, 64), (64, 3, 5, 5)]),
        (torch.nn.functional.scaled_dot_product_attention, [(1, 2, 512, 64)] * 3),
    ],
    ids=["product", "products", "linear", "convolution", "attention"],
)
def test_products_are_seen(operation, shapes):
    """Each of them, and once only: what is counted within another makes a share above 1 where nothing else takes time."""
    given = [torch.randn(shape) for shape in shapes]
    assert 0 < benchmark.time_in_products(lambda: operation(*given)) <= 1
    assert benchmark.time_in_products(given[0].tanh) == 0


def test_time_in_products(monkeypatch):
    """Of 10 us, `mm` takes 5, and the convolution with the work that it calls 2."""
    events = [("matmul", 1, 6), ("mm", 5, 5), ("tanh", 2, 2), ("convolution", 0.5, 2), ("im2col", 1.5, 1.5)]

    @contextlib.contextmanager
    def profile(activities):
        seen = [SimpleNamespace(key=f"aten::{name}", self_cpu_time_total=own, cpu_time_total=whole) for name, own, whole in events]
        yield SimpleNamespace(key_averages=lambda: seen)

    monkeypatch.setattr(benchmark, "profile", profile)
    assert benchmark.time_in_products(lambda: None) == pytest.approx(0.7)


def test_product_rate(clock, monkeypatch):
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, device: 0.5)
    assert product_rate(10, torch.float32, "cpu") == 4000
    assert memory_rate("cpu", count=1000) == 2 * 4 * 1000 / 0.5


def test_table_and_file(case, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CASES, "product", lambda settings: iter([case]))
    file = tmp_path / "new" / "bench.json"
    assert report(["product"], SETTINGS, file) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.count(" | ") for line in lines] == [len(HEADER) - 1] * 5
    assert lines[0].startswith("| case | side | ms | ratio |")
    assert [line.split(" | ")[1] for line in lines[2:]] == [REFERENCE, OURS, FAST]
    written = json.loads(file.read_text())
    assert written["conditions"]["repeats"] == 4
    assert set(written["conditions"]["versions"]) == {"torch", "diffusers", "transformers"}
    first, second, _ = written["results"]
    assert first["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert (second["case"], second["side"], second["flops"]) == ("product", OURS, 1440)
    assert set(written["rates"]) == {"memory", "float32"}
    assert sorted(path.name for path in file.parent.iterdir()) == ["bench.json", "bench.png"]


def test_pieces_come_together_in_one_file(case, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CASES, "product", lambda settings: iter([case]))
    monkeypatch.setitem(CASES, "other", lambda settings: iter([dataclasses.replace(case, name="another")]))
    file = tmp_path / "bench.json"
    for name in ("product", "other", "product"):
        report([name], SETTINGS, file)
    assert [result["case"] for result in json.loads(file.read_text())["results"]] == ["another"] * 3 + ["product"] * 3
    with pytest.raises(ValueError, match=r"--json: bench.json holds results for repeats 4, now 5: choose another file, or remove it"):
        report(["product"], dataclasses.replace(SETTINGS, repeats=5), file)


def test_cells_without_numbers_are_empty(case):
    result = next(run_one(case))
    assert cells(result)[:2] == ["product", REFERENCE]
    empty = result.__class__("import", OURS, Spread(0.5, 0.5, 0.5), Spread(0.25, 0.2, 0.3))
    assert cells(empty) == ["import", OURS, "500.0", "0.25", "0.20 to 0.30", "", "", "", "", ""]


def run_one(case):
    yield from measure(case, SETTINGS, rate=1.0)


def test_rate_is_measured_once_for_each_dtype(case, monkeypatch):
    measured = []
    monkeypatch.setattr(benchmark, "product_rate", lambda size, dtype, device: measured.append(dtype) or 1.0)
    monkeypatch.setitem(CASES, "product", lambda settings: iter([case, case]))
    rates = {}
    assert len(list(run(["product", "product"], SETTINGS, rates))) == 4
    assert measured == [torch.float32]
    assert rates == {torch.float32: 1.0}


def test_command(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(benchmark, "report", lambda names, settings, file: seen.append((list(names), settings, file)) or 0)
    assert command_line.main(["bench", "--quick", "--only", "vae", "step", "--json", "b.json"]) == 0
    names, settings, file = seen[0]
    assert (names, settings.repeats, str(file)) == (["step", "vae"], 3, "b.json")
    assert command_line.main(["bench"]) == 0
    assert seen[1][0] == list(CASES)
    assert seen[1][1] == Settings()
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["bench", "--only", "nothing"])
    assert "--only: expected some of import, step, " in capsys.readouterr().err
