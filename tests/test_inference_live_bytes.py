"""flux_lab.inference.live_bytes: what is alive is counted, once, until it is freed."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux_lab.inference.live_bytes import FusedAttention, LiveBytes, bytes_of


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counting(device):
    given = torch.empty(1000, device=device)
    with LiveBytes(meta=device == "meta") as live, LiveBytes(meta=device == "cpu") as other:
        doubled = given * 2
        assert live.current == 8000
        view = doubled.view(10, 100)[3:]
        view.add_(1)
        assert live.current == 8000
        del doubled
        assert live.current == 8000, "the view keeps it alive"
        del view
        torch.cat([given, given])
        assert live.current == 4000
    assert live.peak == 12000
    assert other.peak == 0


def test_history():
    with LiveBytes(every=2) as live:
        kept = [torch.zeros(100) for _ in range(6)]
        del kept[:]
        torch.zeros(10), torch.zeros(10)
    seconds, alive = zip(*live.history, strict=True)
    assert list(alive[:3]) == [800, 1600, 2400]
    assert alive[3] < 800
    assert list(seconds) == sorted(seconds)


def test_ignored():
    weight, x = torch.empty(100, 100), torch.empty(3, 100)
    with LiveBytes(ignored=[weight]) as live:
        F.linear(x, weight)
    assert live.peak == 2 * 3 * 100 * 4


def test_fused_attention_holds_no_scores():
    query = torch.empty(1, 2, 500, 8, device="meta")
    peaks = []
    for fused in (True, False):
        with FusedAttention() if fused else contextlib.nullcontext(), LiveBytes(meta=True) as live:
            assert F.scaled_dot_product_attention(query, query, query).shape == query.shape
        peaks.append(live.peak)
    assert peaks[0] == 2 * query.nbytes
    assert peaks[1] > 2 * 500 * 500 * 4


def test_shared_weights_count_once():
    first, second = nn.Linear(10, 20), nn.Linear(10, 20)
    second.weight = first.weight
    assert bytes_of(first, second) == 4 * (200 + 20 + 20)
