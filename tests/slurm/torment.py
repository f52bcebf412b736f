"""What a cluster does to a running job, done for real: preemptions, a time limit, a dead node, a requeue.

Owns when a blow falls and the record of it. What must be true of the run afterwards belongs to `user`.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from miles.runs.attempts import Attempt, EndReason, read_attempts
from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths
from tests.chaos.run import STAGE

from .user import User

WAIT_SECONDS = 600.0
"""For anything that must come."""
LONG_MINUTES, SHORT_MINUTES = 60, 2
"""Time limits of an attempt that is not to meet its own, and of one that is. Slurm counts in minutes."""
LEAD_MINUTES = 0.1
"""`slurm.save_lead_minutes` of a run with so short a limit: Slurm's signal comes up to half a minute earlier still."""


class Blow(StrEnum):
    """What happens to the job."""

    PREEMPT = "preempted by partition high"
    LIMIT = "time limit"
    NODE = "kill -9 of a slurmd"
    REQUEUE = "scontrol requeue"


REASON = {
    Blow.PREEMPT: EndReason.PREEMPTED,
    Blow.LIMIT: EndReason.TIME_LIMIT,
    Blow.NODE: EndReason.NODE_FAILURE,
    Blow.REQUEUE: EndReason.REQUEUED,
}
"""The ledger's word for an attempt that it ended."""


@dataclass(frozen=True, slots=True)
class Struck:
    """One blow that has fallen."""

    blow: Blow
    attempt: int
    step: int
    """The last that was done by then."""
    seconds: float
    """Since the attempt began."""
    node: str = ""
    """Whose slurmd was killed."""


class Torment:
    """Strikes a run that was submitted once, attempt by attempt, in a random order at random moments."""

    def __init__(self, user: User, name: str, blows: list[Blow], seed: int) -> None:
        self.struck: list[Struck] = []
        self._user = user
        self._bed = user.bed
        self._name = name
        self._paths = user.run(name)
        self._random = random.Random(seed)
        self._order = self._random.sample(blows, len(blows))

    def overrides(self) -> list[str]:
        """What the run is to be submitted with."""
        return [f'slurm.time="{_minutes(self._order[0])}"', f"slurm.save_lead_minutes={LEAD_MINUTES}"]

    def strike_all(self) -> None:
        """Strike every attempt once, until all blows have fallen."""
        for blow, following in itertools.zip_longest(self._order, self._order[1:]):
            self._strike(blow, _minutes(following))
            print(f"{self._name}: {self.struck[-1]}", flush=True)

    def _strike(self, blow: Blow, minutes: int) -> None:
        """Strike the next attempt at a random moment, and return when the job goes on, with another time limit.

        Half of the blows fall into a step after the attempt's first new one, the others anywhere in its first seconds.
        """
        attempt = self._next_attempt()
        if blow is not Blow.LIMIT and self._random.random() < 0.5:
            time.sleep(self._random.uniform(0.0, 15.0))
        else:
            self._until(lambda: new_steps(self._paths, attempt) > 0, f"attempt {attempt.number} makes no step")
            time.sleep(self._random.uniform(0.0, 3.0))
        if self._current().number != attempt.number or self._current().ended is not None:
            raise RuntimeError(f"attempt {attempt.number} has ended before it was struck: {self._current()}")
        assert attempt.place is not None
        node = self._random.choice(list(attempt.place.nodes)) if blow is Blow.NODE else ""
        step = max((line.step for line in read_metrics(self._paths) if line.stage == STAGE), default=0)
        self.struck.append(Struck(blow, attempt.number, step, round(time.time() - attempt.started, 1), node))
        self._deliver(blow, node, minutes)

    def _deliver(self, blow: Blow, node: str, minutes: int) -> None:
        job = self._user.job(self._name)
        restarts = int(self._bed.show(job)["Restarts"])
        match blow:
            case Blow.PREEMPT:
                self._bed.preempt(job)
            case Blow.REQUEUE:
                self._bed.run("scontrol", "requeue", job)
            case Blow.NODE:
                self._bed.kill_node(node)
            case Blow.LIMIT:
                pass  # it comes by itself
        self._until(lambda: int(self._bed.show(job)["Restarts"]) > restarts, f"job {job} is not requeued: {blow}")
        # Between its two runs the job counts as finished, and cannot be changed.
        self._until(lambda: self._bed.show(job)["JobState"] in ("PENDING", "RUNNING"), f"job {job} does not wait")
        self._bed.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        if node:
            # It comes back when the run goes on elsewhere: until then the old attempt's processes live on there.
            attempt = self._next_attempt()
            self._until(lambda: new_steps(self._paths, attempt) > 0, f"attempt {attempt.number} makes no step")
            self._bed.start_node(node)

    def _next_attempt(self) -> Attempt:
        """The attempt after the one that was struck last."""
        last = self.struck[-1].attempt if self.struck else 0
        self._until(lambda: self._current_number() > last, f"no attempt comes after {last}")
        return self._current()

    def _current_number(self) -> int:
        return max((attempt.number for attempt in stage_attempts(self._paths)), default=0)

    def _current(self) -> Attempt:
        return stage_attempts(self._paths)[-1]

    def _until(self, true: Callable[[], bool], what: str) -> None:
        self._user.until(true, what, self._name, WAIT_SECONDS)


def _minutes(blow: Blow | None) -> int:
    return SHORT_MINUTES if blow is Blow.LIMIT else LONG_MINUTES


def stage_attempts(paths: RunPaths) -> list[Attempt]:
    """The attempts of the stage of reinforcement learning."""
    return [attempt for attempt in read_attempts(paths) if attempt.step == STAGE]


def new_steps(paths: RunPaths, attempt: Attempt) -> int:
    """Training steps that were made since an attempt began."""
    return sum(line.stage == STAGE and line.step > 0 and line.time > attempt.started for line in read_metrics(paths))


def ledger_findings(paths: RunPaths, struck: list[Struck]) -> list[str]:
    """Attempts whose end the ledger does not name rightly."""
    causes = {each.attempt: REASON[each.blow] for each in struck}
    attempts = stage_attempts(paths)
    findings = []
    for attempt in attempts:
        expected = causes.get(attempt.number, EndReason.FINISHED)
        if attempt.reason is not expected:
            findings.append(f"attempt {attempt.number} ended by {attempt.reason}, and was ended by {expected}")
    return findings


def ledger(paths: RunPaths) -> list[dict[str, Any]]:
    """The attempts of the stage, as they go into the results."""
    since = [new_steps(paths, attempt) for attempt in stage_attempts(paths)] + [0]
    return [
        {
            "attempt": attempt.number,
            "reason": attempt.reason,
            "seconds": None if attempt.ended is None else round(attempt.ended - attempt.started, 1),
            "nodes": list(attempt.place.nodes) if attempt.place else [],
            "new_steps": steps - later,
            "note": attempt.note,
            "detail": attempt.detail,
        }
        for attempt, steps, later in zip(stage_attempts(paths), since, since[1:], strict=False)
    ]
