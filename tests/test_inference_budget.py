"""flux_lab.inference.budget: amounts of memory."""

import pytest

from flux_lab.inference.budget import device_memory, gb, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("16 GiB", 16 * 2**30), ("900mb", 900 * 10**6), ("1.5GB", 15 * 10**8), (7, 7), (None, None), ("3B", 3)],
)
def test_parse(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "0GB", "sixteen", "16IB", 0, -5, True, 1.5, ""])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="memory_budget: expected a size such as '16GB' or '900MB', got"):
        parse_bytes(text)


def test_text():
    assert [gb(count) for count in (23_802_816_640, 59_000_000, 1000)] == ["23.80 GB", "59.00 MB", "0.00 MB"]


def test_memory_of_a_device():
    assert device_memory("cpu") > 2**28
    with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:77'"):
        device_memory("cuda:77")
