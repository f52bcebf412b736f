"""Where the time of a run went: its ledgers -> attempts, waits and training steps on one axis of time, as plain values.

Owns what the chart "Attempts", the figures beside it and its table say. Drawing belongs to
`miles.reports.timeline_figure`. Asks no cluster: a ledger outlives what Slurm remembers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from miles.cluster.slurm.jobs import JobRecord
from miles.runs.attempts import Attempt, EndReason
from miles.runs.metrics import MetricsLine

TABLE_ROWS = 50
"""The table has that many attempts at most: the last ones."""


class Ending(Enum):
    """Kinds of ends that a reader should tell apart at a glance: (label, number of the series colour)."""

    FINISHED = ("finished", 3)
    PREEMPTED = ("preempted", 1)
    TIME_LIMIT = ("time limit", 4)
    NODE_FAILURE = ("node failure", 2)
    FAILED = ("failed", 5)
    ASKED = ("ended by somebody", 6)
    OPEN = ("no end recorded", 7)

    @property
    def label(self) -> str:
        return self.value[0]

    @property
    def colour(self) -> int:
        """Place among the series colours of the page, from 1."""
        return self.value[1]


_ENDINGS = {
    EndReason.FINISHED: Ending.FINISHED,
    EndReason.PREEMPTED: Ending.PREEMPTED,
    EndReason.TIME_LIMIT: Ending.TIME_LIMIT,
    EndReason.NODE_FAILURE: Ending.NODE_FAILURE,
    EndReason.STOPPED: Ending.ASKED,
    EndReason.CANCELLED: Ending.ASKED,
    EndReason.REQUEUED: Ending.ASKED,
    EndReason.ENGINE_START: Ending.FAILED,
    EndReason.ENGINE_CRASH: Ending.FAILED,
    EndReason.TRAINER_CRASH: Ending.FAILED,
    EndReason.FAILED: Ending.FAILED,
    EndReason.OUT_OF_MEMORY: Ending.FAILED,
    EndReason.KILLED: Ending.FAILED,
    None: Ending.OPEN,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One attempt. Times are Unix seconds."""

    attempt: Attempt
    job: str
    """What Slurm calls its job; empty: in none."""
    nodes: int
    until: float
    """Its end; of one without an end, its last sign of life."""
    submitted: float | None
    """When its job was submitted; None: it ran in none, or no ledger knows it."""

    @property
    def ending(self) -> Ending:
        return _ENDINGS[self.attempt.reason]

    @property
    def seconds(self) -> float | None:
        """None: no end is recorded, or a clock was set back meanwhile."""
        ended = self.attempt.ended
        return None if ended is None or ended < self.attempt.started else ended - self.attempt.started

    @property
    def place(self) -> str:
        """Where it ran, in words; empty: in no job."""
        return f"job {self.job}, {self.nodes} node{'s' if self.nodes > 1 else ''}" if self.job else ""

    @property
    def hosts(self) -> str:
        """Names of its nodes; of many, the first and the last."""
        names = self.attempt.place.nodes if self.attempt.place else [self.attempt.host]
        return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]}"

    @property
    def remarks(self) -> str:
        """What it said when it started, and when it ended."""
        return "; ".join(filter(None, (self.attempt.note, self.attempt.detail)))


@dataclass(frozen=True, slots=True)
class Wait:
    """A time in which no attempt ran, before the next one of a step. Times are Unix seconds."""

    step: str
    started: float
    until: float
    queued: bool
    """Whether a job for it was in the queue; else nobody had submitted it."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """All attempts of a run. Times are Unix seconds."""

    bars: list[Bar]
    waits: list[Wait]
    reached: dict[str, list[tuple[float, int]]]
    """By stage: when a training step was first reached that was higher than all before."""
    busy: float
    """Seconds in which at least one attempt ran."""
    new: float | None
    """Seconds spent on training steps, each counted once; None: not known."""

    @property
    def started(self) -> float:
        return min([bar.attempt.started for bar in self.bars] + [wait.started for wait in self.waits])

    @property
    def until(self) -> float:
        return max(bar.until for bar in self.bars)

    @property
    def wall(self) -> float:
        """Seconds from the first submission or start to the last end."""
        return self.until - self.started

    @property
    def lanes(self) -> list[str]:
        """Steps in the order of their first attempt."""
        return list(dict.fromkeys(bar.attempt.step for bar in self.bars))

    @property
    def endings(self) -> list[Ending]:
        """The kinds of ends that occur."""
        found = {bar.ending for bar in self.bars}
        return [ending for ending in Ending if ending in found]

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """How many attempts ended for which reason, the most frequent first."""
        return Counter(
            b.attempt.reason.value if b.attempt.reason else "no end recorded" for b in self.bars
        ).most_common()

    @property
    def table(self) -> list[Bar]:
        """The attempts that the table shows."""
        return self.bars[-TABLE_ROWS:]

    @property
    def clock_set_back(self) -> bool:
        """Whether an attempt ended before it started, or started before the one before it."""
        starts = [bar.attempt.started for bar in self.bars]
        ends = [(bar.attempt.started, bar.attempt.ended) for bar in self.bars]
        return starts != sorted(starts) or any(ended is not None and ended < started for started, ended in ends)

    def waited(self, *, queued: bool) -> float:
        """Seconds without an attempt, with a job in the queue or without one."""
        return sum(wait.until - wait.started for wait in self.waits if wait.queued is queued)


def timeline_of(
    attempts: Sequence[Attempt], jobs: Sequence[JobRecord], lines: Sequence[MetricsLine], *, running_at: float | None
) -> Timeline | None:
    """The timeline of a run; None when nothing was started.

    `running_at`: the time now, where the last attempt is known to run; None: that is not known.
    """
    if not attempts:
        return None
    bars = []
    for attempt, later in zip(attempts, [*attempts[1:], None], strict=True):
        record = _submission(attempt, jobs)
        until = _last_sign(attempt, lines, later.started if later else math.inf)
        if later is None and attempt.ended is None and running_at is not None:
            until = max(until, running_at)
        job = str(record.id if record else attempt.place.job) if attempt.place else ""
        nodes = len(attempt.place.nodes) if attempt.place else 1
        bars.append(Bar(attempt, job, nodes, until, record.time if record else None))
    waits, busy = _waits(bars)
    made = _made(bars, lines)
    return Timeline(bars, waits, _reached(made), busy, _new_step_seconds(made))


def _submission(attempt: Attempt, jobs: Sequence[JobRecord]) -> JobRecord | None:
    """The submission that an attempt's job came from; an element of an array runs under a number that no ledger has."""
    if attempt.place is None:
        return None
    before = [record for record in jobs if record.step == attempt.step and record.time <= attempt.started]
    exact = [record for record in before if record.job == attempt.place.job]
    return next(iter(exact or [record for record in reversed(before) if record.element is not None]), None)


def _last_sign(attempt: Attempt, lines: Sequence[MetricsLine], next_start: float) -> float:
    """When an attempt ended; of one without an end, when it wrote its last metrics."""
    if attempt.ended is not None:
        return max(attempt.started, attempt.ended)
    own = (line.time for line in lines if line.stage == attempt.step and attempt.started <= line.time < next_start)
    return max(own, default=attempt.started)


def _waits(bars: Sequence[Bar]) -> tuple[list[Wait], float]:
    """The times in which nothing ran, and the seconds in which something did."""
    waits: list[Wait] = []
    busy, end = 0.0, None
    for bar in sorted(bars, key=lambda bar: bar.attempt.started):
        start, submitted = bar.attempt.started, bar.submitted
        since = end if end is not None else start if submitted is None else submitted
        queued = since if submitted is None else max(since, submitted)
        if bar.attempt.place is None:
            queued = start
        for begin, until, in_queue in ((since, queued, False), (queued, start, True)):
            if begin < until:
                waits.append(Wait(bar.attempt.step, begin, until, in_queue))
        covered = start if end is None else max(start, end)
        busy += max(0.0, bar.until - covered)
        end = max(covered, bar.until)
    return waits, busy


def _made(bars: Sequence[Bar], lines: Sequence[MetricsLine]) -> list[tuple[Bar, MetricsLine]]:
    """Training steps with the attempt that made them; a fork's copied lines were made by none."""
    found: list[tuple[Bar, MetricsLine]] = []
    for line in lines:
        # Neighbours mostly have the same attempt.
        likely = [found[-1][0]] if found else []
        for bar in (*likely, *bars) if line.step > 0 else ():
            if bar.attempt.step == line.stage and bar.attempt.started <= line.time <= bar.until:
                found.append((bar, line))
                break
    return found


def _reached(made: Sequence[tuple[Bar, MetricsLine]]) -> dict[str, list[tuple[float, int]]]:
    reached: dict[str, list[tuple[float, int]]] = {}
    for _, line in sorted(made, key=lambda pair: pair[1].time):
        points = reached.setdefault(line.stage, [])
        if not points or line.step > points[-1][1]:
            points.append((line.time, line.step))
    return reached


def _new_step_seconds(made: Sequence[tuple[Bar, MetricsLine]]) -> float | None:
    """A step that an attempt repeats keeps its first line, so that every line is of new work."""
    seconds = {
        (line.stage, line.step): min(line.values["time/step"], line.time - bar.attempt.started)
        for bar, line in made
        if math.isfinite(line.values.get("time/step", math.nan))
    }
    return sum(seconds.values()) if seconds else None
