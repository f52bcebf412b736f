"""The engines of a step: where each is now, which weights it holds, whether it may be asked.

An engine is known by its index; `Engine` is one *start* of it. A start that is over (its process died, another one took
its place) is never asked again, and a new start holds nothing but the weights of the model's directory. Owns that
bookkeeping; requests belong to `miles.rollout.client`, starting engines to `miles.cluster`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from miles.runs.endpoints import Endpoint, read_endpoints

READ_SECONDS = 0.1
"""How often the file is read at most."""
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class Engine:
    """One start of an engine."""

    endpoint: Endpoint
    weights: int | None = None
    """Version of the weights that were pushed into it."""
    load: int = 0
    """Responses that it is generating for us."""
    asleep: bool = False
    """Whether it gave up its memory."""
    pause: float = 0.0
    paused_until: float = 0.0

    def __str__(self) -> str:
        return f"engine {self.endpoint.index} ({self.endpoint.url})"

    def unreachable(self) -> bool:
        """It did not answer: leave it alone for a while. If it died, the supervisor will say so. Returns whether that
        is news.
        """
        if self.paused_until > time.monotonic():
            return False
        self.pause = min(max(FIRST_PAUSE_SECONDS, 2 * self.pause), LONGEST_PAUSE_SECONDS)
        self.paused_until = time.monotonic() + self.pause
        return True

    def answered(self) -> None:
        """It answered: all is well."""
        self.pause = self.paused_until = 0.0


class EngineList:
    """The engines of a file that the supervisor keeps up to date."""

    def __init__(self, file: Path, *, receive_weights: bool) -> None:
        """`receive_weights`: an engine serves only once it was given the current weights; otherwise at once."""
        self.version: int | None = None
        """Version of the weights that an engine must hold to serve."""
        self._file = file
        self._receive_weights = receive_weights
        self._engines: dict[int, Engine] = {}
        self._receivers: dict[int, Engine] = {}
        self._read_at = -READ_SECONDS
        self.refresh()

    def refresh(self, *, now: bool = False) -> None:
        """Read the file, unless it was read a moment ago. `now`: in any case."""
        if not now and time.monotonic() < self._read_at + READ_SECONDS:
            return
        self._read_at = time.monotonic()
        known = self._engines
        self._engines = {endpoint.index: _same_start(known, endpoint) for endpoint in read_endpoints(self._file)}

    @property
    def all_ready(self) -> bool:
        """Whether there are engines, and each has answered, also when it was last asked."""
        now = time.monotonic()
        engines = self._engines.values()
        return bool(engines) and all(engine.endpoint.ready and engine.paused_until <= now for engine in engines)

    @property
    def ready(self) -> list[Engine]:
        """Engines that have answered, by index."""
        return [engine for _, engine in sorted(self._engines.items()) if engine.endpoint.ready]

    @property
    def in_service(self) -> list[Engine]:
        """Engines that may generate."""
        return [engine for engine in self.ready if not self._receive_weights or self._holds(engine, self.version)]

    def least_loaded(self, avoid: Collection[Engine] = ()) -> Engine | None:
        """The engine in service with the fewest responses in flight, rather none of `avoid`; None: nobody can be
        asked."""
        now = time.monotonic()
        able = [engine for engine in self.in_service if engine.paused_until <= now]
        return min(able, key=lambda engine: (engine in avoid, engine.load, engine.endpoint.index), default=None)

    def needs_weights(self) -> bool:
        """Whether an engine has come up that does not hold the current weights."""
        return self._receive_weights and bool(self._without(self.version))

    def receivers(self, version: int) -> list[int]:
        """Indices of the engines that are up and do not hold weights of `version`, which serve from now on only with
        them. Until the next call, `receiver` finds exactly these starts.
        """
        self.refresh(now=True)
        self.version = version
        self._receivers = {engine.endpoint.index: engine for engine in self._without(version)}
        return sorted(self._receivers)

    def receiver(self, index: int) -> Engine | None:
        """The engine that is being given weights; None when that start of it is over."""
        engine = self._receivers.get(index, self._engines.get(index))
        return engine if engine is not None and self.current(engine) else None

    def current(self, engine: Engine) -> bool:
        """Whether this start of an engine is not over, as far as the file knows."""
        return self._engines.get(engine.endpoint.index) is engine

    def pushed(self, version: int, indices: Sequence[int]) -> None:
        """`version`, which `receivers` was asked for, was pushed into these engines."""
        assert version == self.version, f"weights of version {version} instead of {self.version}"
        for index in indices:
            engine = self.receiver(index)
            if engine is not None:
                engine.weights = version

    def _without(self, version: int | None) -> list[Engine]:
        """Engines that are up and do not hold `version`. One that has just not answered is no use trying."""
        now = time.monotonic()
        return [engine for engine in self.ready if engine.paused_until <= now and not self._holds(engine, version)]

    def _holds(self, engine: Engine, version: int | None) -> bool:
        return version is not None and engine.weights == version and not engine.asleep


def _same_start(known: dict[int, Engine], endpoint: Endpoint) -> Engine:
    engine = known.get(endpoint.index)
    if engine is None or (engine.endpoint.start, engine.endpoint.url) != (endpoint.start, endpoint.url):
        return Engine(endpoint)
    engine.endpoint = endpoint
    return engine
