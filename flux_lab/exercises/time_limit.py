"""A call that is given up when it takes too long, so that an answer with an endless loop does not hang the notebook."""

import queue
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch


class HangingError(BaseException):
    """The time is up. No Exception: `except Exception` inside an endless loop must not catch it."""


def call(function: Callable, arguments: Iterable[Any], seconds: float) -> Any:
    """`function(*arguments)`. Raises HangingError after `seconds`, and whatever the function raises.

    In the main thread, where Jupyter runs cells, an alarm stops the function (one long operation of torch comes to its end first).
    Where there is no alarm, on Windows and in other threads, the function is left to itself in a thread that ends with the program.
    """
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        return _with_alarm(function, arguments, seconds)
    return _in_thread(function, arguments, seconds)


def _with_alarm(function: Callable, arguments: Iterable[Any], seconds: float) -> Any:
    def ring(*_: Any) -> None:
        raise HangingError

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        # None: it was set by something other than Python and cannot be put back.
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)


def _in_thread(function: Callable, arguments: Iterable[Any], seconds: float) -> Any:
    outcome: queue.SimpleQueue = queue.SimpleQueue()
    grad = torch.is_grad_enabled()  # each thread has a switch of its own

    def work() -> None:
        try:
            with torch.set_grad_enabled(grad):
                outcome.put((function(*arguments), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise HangingError from None
    if error is not None:
        raise error
    return result
