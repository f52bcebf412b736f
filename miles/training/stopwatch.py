"""Wall-clock seconds per phase of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds by phase name until `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """`time/PHASE` of each phase and `time/step` since the last call; starts again from zero."""
        now = time.perf_counter()
        metrics = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        metrics["time/step"] = now - self._start
        self._seconds, self._start = {}, now
        return metrics
