"""One job through a list of allocations, as arithmetic: what each attempt gets done, and what is left on the disk.

Owns the simulation of `goodput.py`: pure, without randomness and without figures of its own. A training step is a
generation, which can be cut anywhere, and a training, which counts only when it is done. Times are seconds.

What an attempt does is what `miles.training.rl` and `miles.training.checkpointing` do: the newest checkpoint is loaded;
batches that the journal holds are trained on again without being generated; a job that listens stops its generation at
once, finishes a training that it is in, and saves if 1.5 times the duration of a save is left. `save_interval` and
`mean_time_between_failures` are the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from miles.runs.attempts import Attempt, EndReason
from miles.training.distributed import END_MARGIN_SECONDS
from miles.training.interval import mean_time_between_failures, save_interval

PRIOR_SECONDS = 12 * 3600.0
"""`checkpoint.mtbf_hours` where nobody has set it."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a job takes for what it does."""

    generate: float
    """Of one training step."""
    train: float
    """The rest of that step: scoring, update, weights to the engines."""
    startup: float
    """From the start of the allocation until it generates or trains, the checkpoint loaded."""
    save: float
    """Until a checkpoint is complete on the disk."""
    stall: float
    """Of these, how long training stands still when the save is made in the background."""
    lost_by_kill: float = 0.0
    """Generation that a kill takes although there is a journal: what was not flushed yet."""

    @property
    def step(self) -> float:
        return self.generate + self.train


@dataclass(frozen=True, slots=True)
class Policy:
    """What is kept, and when."""

    name: str
    journal: bool
    listens: bool
    """Whether a signal makes it save and leave; else it dies of it."""
    every: int | None
    """Training steps between two saves; None: `checkpoint.every = "auto"`."""


class Cause(StrEnum):
    """Why an allocation ends."""

    PREEMPTED = "preempted"
    TIME_LIMIT = "time-limit"
    NODE_FAILURE = "node-failure"
    WEEK_OVER = "week-over"
    """It does not: the simulation ends."""


_REASONS = {
    Cause.PREEMPTED: EndReason.PREEMPTED,
    Cause.TIME_LIMIT: EndReason.TIME_LIMIT,
    Cause.NODE_FAILURE: EndReason.NODE_FAILURE,
    Cause.WEEK_OVER: None,
}


@dataclass(frozen=True, slots=True)
class Allocation:
    """One time that the job has its nodes."""

    started: float
    told: float
    """Seconds after the start until it is told that it must leave; infinity: never."""
    killed: float
    """Seconds after the start until it is killed, if it is still there."""
    cause: Cause


@dataclass(frozen=True, slots=True)
class Kept:
    """What is on the disk."""

    saved: int = 0
    """Training step of the newest checkpoint."""
    batches: int = 0
    """The last training step whose batch is there."""
    begun: float = 0.0
    """Seconds of generation of the step after that one."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What one attempt did with its time."""

    seconds: float
    """For which it held the nodes."""
    startup: float
    saving: float
    """Stalls by saves, waits for them, and the last one."""
    generating: float
    training: float
    step: int
    """The last training step that it finished, or that it began from."""
    replayed: int
    """Training steps that it did again from the journal."""
    kept: Kept
    """What it left."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job's way through its allocations."""

    job: Job
    attempts: list[Spent]

    @property
    def steps(self) -> int:
        return max((attempt.step for attempt in self.attempts), default=0)

    @property
    def useful(self) -> float:
        """Seconds that its training steps take when nothing happens, each counted once."""
        return self.steps * self.job.step

    @property
    def allocated(self) -> float:
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def goodput(self) -> float:
        return self.useful / self.allocated

    @property
    def startup(self) -> float:
        return sum(attempt.startup for attempt in self.attempts)

    @property
    def saving(self) -> float:
        return sum(attempt.saving for attempt in self.attempts)

    @property
    def generated_again(self) -> float:
        """Generation whose result was lost, or that is not trained on yet at the end."""
        return sum(attempt.generating for attempt in self.attempts) - self.steps * self.job.generate

    @property
    def trained_again(self) -> float:
        """Training whose result was lost, or that is not done at the end."""
        return sum(attempt.training for attempt in self.attempts) - self.steps * self.job.train


def simulate(job: Job, policy: Policy, allocations: Sequence[Allocation], *, steps: float = math.inf) -> Outcome:
    """The job in these allocations, until it has made `steps` training steps."""
    kept, spent, ledger = Kept(), list[Spent](), list[Attempt]()
    for allocation in allocations:
        running = _Running(job, policy, allocation, kept, ledger, steps)
        spent.append(running.run())
        kept = spent[-1].kept
        ended = allocation.started + spent[-1].seconds
        ledger.append(_entry(len(spent), allocation, ended=ended, reason=_REASONS[allocation.cause]))
        if spent[-1].step >= steps:
            break
    return Outcome(job, spent)


def _entry(number: int, allocation: Allocation, *, ended: float | None, reason: EndReason | None) -> Attempt:
    return Attempt(number, "grpo", "n1", allocation.started, ended=ended, reason=reason)


class _Over(Exception):
    """The attempt has ended at the clock's time."""


class _Running:
    """One attempt; `clock` counts from the start of its allocation."""

    def __init__(
        self, job: Job, policy: Policy, allocation: Allocation, kept: Kept, ledger: list[Attempt], steps: float
    ) -> None:
        self._job, self._policy, self._allocation, self._last = job, policy, allocation, steps
        self._told, self._end = _ends(job, policy, allocation)
        # What every later moment of this attempt adds to the ledger is its own duration.
        self._ledger = [*ledger, _entry(len(ledger) + 1, allocation, ended=None, reason=None)]
        self._interval = 0.0 if policy.every else self._auto_interval(0.0)
        self.clock = 0.0
        self._spent = dict.fromkeys(("startup", "saving", "generating", "training"), 0.0)
        self.step = self.saved = kept.saved
        self.batches, self.begun = (kept.batches, kept.begun) if policy.journal else (kept.saved, 0.0)
        self.replayed = 0
        self._known_save = kept.saved > 0
        self._save_began = 0.0
        self._writing: tuple[int, float] | None = None
        """Step of the save in progress, and when it will be complete."""

    def run(self) -> Spent:
        try:
            self._start()
            while self.step < self._last:
                self._generate()
                self._train()
                self._save_if_due()
        except _Over:
            pass
        self._complete(at=self.clock)
        kept = Kept(self.saved, self.batches, self.begun) if self._policy.journal else Kept(self.saved, self.saved)
        # A checkpoint holds what the journal holds of the steps before it.
        if kept.batches < kept.saved:
            kept = Kept(kept.saved, kept.saved)
        return Spent(self.clock, **self._spent, step=self.step, replayed=self.replayed, kept=kept)

    def _start(self) -> None:
        """A job that is told to leave before it is ready has nothing to save."""
        end = min(self._told, self._end)
        self._pass(min(self._job.startup, end), "startup")
        if self._job.startup >= end:
            raise _Over

    def _generate(self) -> None:
        if self._told <= self.clock:
            self._leave()
        if self.step < self.batches:
            self.replayed += 1
            return
        left = self._job.generate - self.begun
        stop = min(self._told, self._end)
        if self.clock + left > stop:
            done = stop - self.clock
            killed = self._end <= self._told
            self.begun += max(0.0, done - self._job.lost_by_kill) if killed else done
            self._pass(done, "generating")
            if killed:
                raise _Over
            self._leave()
        self._pass(left, "generating")
        self.batches, self.begun = self.batches + 1, 0.0

    def _train(self) -> None:
        self._pass(self._job.train, "training")
        self.step += 1
        self._complete(at=self.clock)

    def _save_if_due(self) -> None:
        if self._due():
            self._wait_for_save()
            self._save_began = self.clock
            self._pass(self._job.stall, "saving")
            self._writing = (self.step, self._save_began + self._job.save)
            self._known_save = True

    def _due(self) -> bool:
        if self._policy.every is not None:
            return self.step % self._policy.every == 0
        if self._writing is not None:
            return False
        if not self._known_save:
            return True
        waited = self.clock - self._save_began
        # Without a failure the interval only grows: most steps need no exact answer.
        return waited >= self._interval and waited >= self._auto_interval(self.clock)

    def _auto_interval(self, clock: float) -> float:
        now = self._allocation.started + clock
        mtbf = mean_time_between_failures(self._ledger, prior=PRIOR_SECONDS, now=now)
        trained = self._job.train / self._job.step
        return save_interval(self._job.stall, mtbf, max(trained, 0.01) if self._policy.journal else 1.0)

    def _leave(self) -> None:
        """Save, if there is time, and end."""
        self._wait_for_save()
        if self.step > self.saved and 1.5 * self._job.save < self._end - self.clock:
            self._pass(self._job.save, "saving")
            self.saved = self.step
        raise _Over

    def _wait_for_save(self) -> None:
        if self._writing is not None:
            self._pass(max(0.0, self._writing[1] - self.clock), "saving")
            self._complete(at=self.clock)

    def _complete(self, at: float) -> None:
        if self._writing is not None and self._writing[1] <= at:
            self.saved, self._writing = self._writing[0], None

    def _pass(self, seconds: float, what: str) -> None:
        """Let time pass that is spent on `what`, or what is left of it."""
        over = self.clock + seconds > self._end
        until = self._end if over else self.clock + seconds
        self._spent[what] += until - self.clock
        self.clock = until
        if over:
            raise _Over


def _ends(job: Job, policy: Policy, allocation: Allocation) -> tuple[float, float]:
    """When the job is told, and when it dies, in seconds after its start."""
    if allocation.cause is Cause.TIME_LIMIT:
        # Its end is known. A job that listens goes as early as a save of its size needs.
        early = min(allocation.told, allocation.killed - END_MARGIN_SECONDS - 2 * job.save)
        return (max(0.0, early), allocation.killed) if policy.listens else (math.inf, allocation.killed)
    if policy.listens:
        return allocation.told, allocation.killed
    return math.inf, min(allocation.told, allocation.killed)
