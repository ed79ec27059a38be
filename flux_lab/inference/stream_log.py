"""What a streamer does when: for pictures of reading and computing at the same time."""

import time
from typing import Any

from torch import Tensor

from flux_lab.inference.streaming import Streamer

Event = tuple[str, float, float]


class LoggedStreamer(Streamer):
    """A Streamer that writes down its work.

    `rows`: for each of its two threads (what, start, stop) in seconds since it was made. `resident`: (second, bytes) whenever the bytes
    of the blocks that are there, or are being read, change.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.rows: dict[str, list[Event]] = {"reading thread": [], "computing thread": []}
        self.resident: list[tuple[float, int]] = [(0.0, 0)]
        self._there: dict[int, int] = {}
        self._origin, self._start = time.perf_counter(), 0.0

    def _now(self) -> float:
        return time.perf_counter() - self._origin

    def _changed(self) -> None:
        self.resident.append((self._now(), sum(list(self._there.values()))))

    def _read(self, index: int) -> dict[str, Tensor]:
        self._there[index] = sum(self.empty[name].nbytes for name in self.blocks[index])
        self._changed()
        start = self._now()
        tensors = super()._read(index)
        self.rows["reading thread"].append(("reading", start, self._now()))
        return tensors

    def _bring(self, index: int) -> None:
        start = self._now()
        super()._bring(index)
        self._start = self._now()
        self.rows["computing thread"].append(("waiting", start, self._start))

    def _take_away(self, index: int) -> None:
        self.rows["computing thread"].append(("computing", self._start, self._now()))
        super()._take_away(index)
        self._there.pop(index, None)
        self._changed()
