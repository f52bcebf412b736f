"""Killing a run again and again, and continuing it by the same command, until it ends well.

Owns who is killed when, and the record of it. Every victim is a process that the run's own ledger or claim names, and
that still is the process which was recorded there.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from miles.runs.metrics import read_metrics
from miles.runs.progress import read_progress
from tests.chaos.run import STAGE, STUCK_SECONDS, Submit, kill, last_step, log_tails, processes
from tests.chaos.shim import Shim


class Kind(StrEnum):
    """What happens to the run."""

    RANK = "kill -9 of a trainer rank"
    ENGINE = "kill -9 of an engine"
    DRIVER = "kill -9 of the driver"
    ALL = "kill -9 of every process at once"
    WRITE = "kill -9 at a random write"
    TERM = "SIGTERM to the driver"
    USR2 = "SIGUSR2 to the driver"
    FREEZE = "SIGSTOP of an engine"


SIGNALS = {Kind.TERM: signal.SIGTERM, Kind.USR2: signal.SIGUSR2, Kind.FREEZE: signal.SIGSTOP}
ROLE = {Kind.RANK: "trainer", Kind.ENGINE: "engine", Kind.FREEZE: "engine"}
EXIT_CODES = {
    Kind.RANK: {6},
    Kind.ENGINE: {5},
    Kind.DRIVER: {4},
    Kind.ALL: {-9},
    Kind.WRITE: {4, 5, 6, -9},
    Kind.TERM: {75},
    Kind.USR2: {75},
    Kind.FREEZE: {5},
}
"""How the submit may end after it (miles.errors); a run that goes on by itself ends with 0."""

WEIGHTS = {
    Kind.RANK: 4,
    Kind.ENGINE: 4,
    Kind.DRIVER: 4,
    Kind.ALL: 4,
    Kind.WRITE: 4,
    Kind.TERM: 2,
    Kind.USR2: 2,
    Kind.FREEZE: 1,
}
MAX_WRITES_AHEAD = 12
"""A blow at a write falls on one of the next ones."""


@dataclass(slots=True)
class Kill:
    """One blow."""

    kind: Kind
    after: float
    """Seconds since the submit began."""
    stage: str
    step: int
    phase: str
    """What the run was doing by its own word (progress.json); empty before it said anything."""
    victim: str
    """Process id, or the change to a file that it fell on."""


@dataclass(slots=True)
class Life:
    """One submit, from its start to its end."""

    started: float
    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0
    exit_code: int | None = None
    first_token_seconds: float | None = None
    """Until the first new file in the rollout journal; at most the flush interval later than its first token."""
    first_step_seconds: float | None = None
    """Until the first new line of reinforcement-learning metrics."""

    @property
    def ended_by(self) -> Kind | None:
        """The last blow, where the submit did not end well after it."""
        return self.kills[-1].kind if self.kills and self.exit_code != 0 else None


@dataclass(frozen=True, slots=True)
class Blow:
    """What is going to happen, and when."""

    kind: Kind
    live: bool
    """It falls into the step after the next one that this submit makes; else anywhere."""
    delay: float
    """How far into that step, as a fraction of the one before; else seconds from the start or the blow before."""


class Plan:
    """A seeded endless sequence of blows. Two thirds of them fall while new steps are made, the others anywhere."""

    def __init__(self, seed: int, undisturbed_seconds: float) -> None:
        self._random = random.Random(seed)
        self._horizon = undisturbed_seconds / 2

    def next(self) -> Blow:
        kind = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        live = self._random.random() < 2 / 3
        return Blow(kind, live, self._random.uniform(0.0, 1.0 if live else self._horizon))

    def writes_ahead(self) -> int:
        """Which of the next writes a blow at a write falls on, counted from 1."""
        return self._random.randint(1, MAX_WRITES_AHEAD)

    def choose(self, pids: list[int]) -> int:
        return self._random.choice(pids)


def torment(file: Path, plan: Plan, *, shim: Shim, max_kills: int) -> list[Life]:
    """Submit a run, strike it, submit it again, until it ends well; after `max_kills` it is left alone.

    Raises AssertionError when a submit ends otherwise than it should after what happened to it, TimeoutError when one
    hangs.
    """
    lives: list[Life] = []
    while not lives or lives[-1].exit_code != 0:
        left = max_kills - sum(len(life.kills) for life in lives)
        lives.append(live(file, plan, shim=shim, max_kills=left))
    return lives


def live(file: Path, plan: Plan, *, shim: Shim, max_kills: int) -> Life:
    """One submit, struck by the plan until it ends or goes on alone."""
    shim.arm()
    submit = Submit(file, environment=shim.environment)
    life = Life(submit.started)
    try:
        for _ in range(max_kills):
            blow = plan.next()
            unit = _wait_for_new_step(submit, life) if blow.live else 1.0
            watch(submit, life, until=time.time() + unit * blow.delay)
            if not _strike(submit, life, blow.kind, plan, shim) or blow.kind not in ROLE:
                break
        watch(submit, life, until=submit.started + STUCK_SECONDS)
        if submit.running():
            raise TimeoutError(f"the run hangs\n{submit.output()}\n{log_tails(submit.paths)}")
    except BaseException:
        submit.kill()
        raise
    life.exit_code = submit.process.wait()
    life.seconds = time.time() - life.started
    life.first_step_seconds = _first_step(submit, life)
    _check_exit(submit, life)
    return life


def _strike(submit: Submit, life: Life, kind: Kind, plan: Plan, shim: Shim) -> bool:
    """Deliver a blow as soon as there is somebody whom it can hit; False when the submit ended before."""
    if kind is Kind.WRITE:
        return _strike_write(submit, life, shim, plan.writes_ahead())
    while submit.running():
        with _torn_reads():
            running = processes(submit.paths)
            victims = [pid for pid, role in running.items() if role == ROLE.get(kind, "driver")]
            if victims:
                victim = plan.choose(victims)
                _record(submit, life, kind, str(victim))
                everybody = [submit.process.pid, *running] if kind is Kind.ALL else [victim]
                for pid in everybody:
                    kill(pid, SIGNALS.get(kind, signal.SIGKILL))
                return True
        watch(submit, life, until=time.time() + 0.02)
    return False


def _strike_write(submit: Submit, life: Life, shim: Shim, number: int) -> bool:
    shim.arm(number)
    while submit.running() and shim.count() < number:
        watch(submit, life, until=time.time() + 0.02)
    if shim.count() < number:
        shim.arm()
        return False
    time.sleep(0.1)  # it is counted first, then logged
    victim = next(str(change) for change in shim.changes() if change.number == number)
    _record(submit, life, Kind.WRITE, victim)
    return True


def _record(submit: Submit, life: Life, kind: Kind, victim: str) -> None:
    progress = read_progress(submit.paths)
    where = (progress.stage, progress.step, progress.phase) if progress else ("", 0, "")
    life.kills.append(Kill(kind, time.time() - submit.started, *where, victim))


def _wait_for_new_step(submit: Submit, life: Life) -> float:
    """Return when there is one; the seconds that it took."""
    before = last_step(submit.paths)
    while submit.running() and last_step(submit.paths) == before and time.time() < submit.started + STUCK_SECONDS:
        watch(submit, life, until=time.time() + 0.05)
    return max((line.values["time/step"] for line in read_metrics(submit.paths)[-1:]), default=0.0)


def watch(submit: Submit, life: Life, *, until: float) -> None:
    """Wait, and see the first new file of the journal."""
    journal = submit.paths.journal(STAGE)
    while submit.running() and time.time() < until:
        if life.first_token_seconds is None:
            with contextlib.suppress(FileNotFoundError):
                times = [path.stat().st_mtime for path in journal.glob("step-*/*.h5")]
                if times and max(times) > life.started:
                    life.first_token_seconds = max(times) - life.started
        time.sleep(min(0.02, max(0.0, until - time.time())))


def _first_step(submit: Submit, life: Life) -> float | None:
    lines = [line for line in read_metrics(submit.paths) if line.stage == STAGE and line.step > 0]
    times = [line.time for line in lines if line.time > life.started]
    return min(times) - life.started if times else None


def _check_exit(submit: Submit, life: Life) -> None:
    """A submit that was not struck ends well, another as the blow's exit code says; none with a traceback."""
    allowed = {0}.union(*(EXIT_CODES[each.kind] for each in life.kills))
    blows = ", ".join(each.kind for each in life.kills) or "nothing"
    assert life.exit_code in allowed, (
        f"exit code {life.exit_code} after {blows}; expected one of {sorted(allowed)}\n"
        f"{submit.output()}\n{log_tails(submit.paths)}"
    )


@contextlib.contextmanager
def _torn_reads() -> Iterator[None]:
    """Files of the run may come and go while they are looked at from outside."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        yield
