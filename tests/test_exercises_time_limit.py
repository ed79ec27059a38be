"""The time limit: it stops a hanging call, passes on everything else, and puts the alarm back as it was."""

import signal
import threading
import time

import pytest
import torch

from flux_lab.exercises import time_limit
from flux_lab.exercises.time_limit import HangingError, call


def endless() -> None:
    while True:
        pass


def stubborn() -> None:
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


@pytest.fixture(params=["alarm", "thread"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to keep the time: as on Linux and macOS, and as where there is no alarm."""
    if request.param == "thread":
        monkeypatch.setattr(time_limit, "signal", object())
    elif not hasattr(signal, "setitimer"):
        pytest.skip("no alarm on this system")
    return request.param


def test_what_is_quick_is_passed_on(way: str) -> None:
    assert call(lambda x, y: x - y, [5, 3], seconds=60) == 2
    with pytest.raises(KeyError, match="width"):
        call({}.__getitem__, ["width"], seconds=60)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert call(torch.is_grad_enabled, [], seconds=60) is grad


def test_sleeping_call_is_given_up(way: str) -> None:
    start = time.monotonic()
    with pytest.raises(HangingError):
        call(time.sleep, [60], seconds=0.1)
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm on this system")
@pytest.mark.parametrize("function", [endless, stubborn])
def test_alarm_ends_the_function_itself(function) -> None:
    def ring(*_):
        raise AssertionError("the alarm of somebody else")

    before, threads = signal.signal(signal.SIGALRM, ring), set(threading.enumerate())
    signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        with pytest.raises(HangingError):
            call(function, [], seconds=0.1)
        assert signal.getsignal(signal.SIGALRM) is ring
        assert 500 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
        assert set(threading.enumerate()) <= threads, "none was started"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_another_thread_has_a_limit_too() -> None:
    seen = []

    def work():
        try:
            call(time.sleep, [60], seconds=0.1)
        except HangingError as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert len(seen) == 1
