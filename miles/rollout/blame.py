"""Which groups are to blame when requests fail: tried again, run alone, or set aside.

A group whose request an engine refuses, or fails `max_retries` times while it lives, is quarantined. When an engine
dies, all groups in flight on it are innocent at first. One that was there at two deaths is a suspect: it runs alone,
after all others. If the engine dies then too, nobody else can have killed it. Pure bookkeeping.
"""

from __future__ import annotations

import time
from collections import Counter

from miles.rollout.engines import Engine

DEATHS_OF_A_SUSPECT = 2
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0


class Blame:
    """The record of groups by position."""

    def __init__(self, max_retries: int) -> None:
        self.quarantined: dict[int, str] = {}
        """Groups that no engine can serve, with the reason."""
        self._max_retries = max_retries
        self._failed: dict[int, list[Engine]] = {}
        """Engines that failed the group's newest request, one entry per attempt."""
        self._not_before: dict[int, float] = {}
        self._deaths: Counter[int] = Counter()

    def answered(self, position: int) -> None:
        """Its newest request was served."""
        self._failed.pop(position, None)
        self._not_before.pop(position, None)

    def refused(self, position: int, detail: str) -> None:
        """No engine will serve it."""
        self.quarantined[position] = detail

    def failed(self, position: int, engine: Engine, detail: str) -> None:
        """A living engine failed it: another attempt may succeed, on another engine where there is one."""
        engines = self._failed.setdefault(position, [])
        engines.append(engine)
        if len(engines) > self._max_retries:
            self.quarantined[position] = f"{detail} ({len(engines)} attempts)"
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (len(engines) - 1), LONGEST_PAUSE_SECONDS)
        self._not_before[position] = time.monotonic() + pause

    def died(self, position: int, detail: str, *, alone: bool) -> None:
        """The engine died with it in flight; `alone`: with nothing else in flight anywhere."""
        if alone and self.is_suspect(position):
            self.quarantined[position] = f"it kills engines, alone as well: {detail}"
        self._deaths[position] += 1

    def is_suspect(self, position: int) -> bool:
        """Whether it must run alone."""
        return self._deaths[position] >= DEATHS_OF_A_SUSPECT

    def may_start(self, position: int) -> bool:
        """Whether it need not wait (any longer) for its next attempt."""
        return self._not_before.get(position, 0.0) <= time.monotonic()

    def avoid(self, position: int) -> list[Engine]:
        """Engines that failed its newest request."""
        return self._failed.get(position, [])
