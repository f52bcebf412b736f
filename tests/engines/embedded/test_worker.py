"""The engine's thread and those who ask it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from miles.engines.embedded.worker import EngineWorker


def test_who_asks_and_goes_away_does_not_end_the_engine() -> None:
    worker = EngineWorker(cast(Any, SimpleNamespace(idle=True)))
    gone = worker.call(lambda scheduler: 1)
    assert gone.cancel()
    waits = worker.call(lambda scheduler: 2)
    failures: list[BaseException] = []
    worker.start(failures.append)
    assert waits.result(60) == 2
    worker.stop()
    assert failures == []
