"""The state of a run and of its steps, read from its directory: the ledger, done.json and the claim.

What the cluster says about its jobs is a value that the caller brings (`miles.cluster.slurm.queue`): without it, or
where the cluster has forgotten a job, the directory alone decides.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from miles.config.load import load_resolved
from miles.errors import MilesError
from miles.runs.attempts import Attempt, EndReason, read_attempts
from miles.runs.claim import Holder, current_holder
from miles.runs.paths import RunPaths
from miles.workflow.plan import PlannedStep, plan_run


class State(StrEnum):
    """State of a step, and of a whole run."""

    PENDING = "pending"
    QUEUED = "queued"
    """A job of the cluster waits to begin, or to begin again."""
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    """Asked to stop."""
    KILLED = "killed"
    """Its process is gone and left no word."""


ENDED_IN_ORDER = (
    EndReason.STOPPED,
    EndReason.TIME_LIMIT,
    EndReason.PREEMPTED,
    EndReason.REQUEUED,
    EndReason.CANCELLED,
)
"""Reasons that are no fault of the run's."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One job of the cluster that was submitted for the run."""

    step: str
    job: int
    """Its number; of an element of an array that waits in it, that of the array."""
    name: str
    """What the cluster's commands call it: its number, or `53_3` for an element of an array."""
    kind: str
    """Why it was submitted: `first`, `chain` or `resume`."""
    submitted: float
    """Unix time, in seconds, as all times here."""
    state: str
    """The cluster's word; empty: it has forgotten the job, or could not be asked."""
    live: bool
    """Whether it waits or runs."""
    waiting: bool
    reason: str
    """Why it waits."""
    restarts: int
    nodes: list[str]
    started: float | None
    """When it began; of a job that waits, when the cluster thinks that it will."""
    ends: float | None
    """When its time limit is over."""
    runs: list[str] = field(default_factory=list)
    """How each of its runs ended, where the cluster has forgotten the job and its accounting has not."""


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What the cluster says about the jobs of a run."""

    jobs: list[JobStatus] = field(default_factory=list)
    """What was submitted, oldest first; empty for a run that never was."""
    problem: str = ""
    """Why the cluster could not be asked."""

    @property
    def live(self) -> list[JobStatus]:
        """Jobs that wait or run."""
        return [job for job in self.jobs if job.live]


@dataclass(frozen=True, slots=True)
class StepStatus:
    """One step."""

    name: str
    kind: str
    state: State
    attempts: int
    started: float | None
    """Unix time at which the attempt that counts began; None: there was none."""
    seconds: float | None
    """Duration of that attempt, up to now when it runs; None: not begun, or not known."""
    reason: EndReason | None
    """Why the last attempt ended."""
    detail: str
    """Why it is not done, for a person."""
    note: str
    """What the last attempt had to say when it started."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run."""

    name: str
    directory: str
    state: State
    holder: Holder | None
    """The live process that drives it."""
    steps: list[StepStatus]
    cluster: ClusterView = field(default_factory=ClusterView)

    @property
    def failed_step(self) -> StepStatus | None:
        """The step that ended a failed, stopped or killed run."""
        ended = (State.FAILED, State.STOPPED, State.KILLED)
        return next((step for step in self.steps if step.state in ended), None)


def read_status(paths: RunPaths, cluster: ClusterView | None = None, *, now: float | None = None) -> RunStatus:
    """State of a run as its directory tells it, and the cluster about its jobs."""
    config = load_resolved(paths.root)
    cluster = cluster or ClusterView()
    holder = _live_holder(paths, cluster)
    attempts = read_attempts(paths)
    now = time.time() if now is None else now
    driven = holder is not None
    waiting = {job.step for job in cluster.live if job.waiting or not driven}
    steps = [
        step_status(
            planned,
            [a for a in attempts if a.step == planned.name],
            driven=driven,
            queued=planned.name in waiting,
            now=now,
        )
        for planned in plan_run(config, paths)
    ]
    state = run_state(steps, driven=driven)
    return RunStatus(config.name, str(paths.root), state, holder, steps, cluster)


def _live_holder(paths: RunPaths, cluster: ClusterView) -> Holder | None:
    """Who drives the run; a process of a node cannot be asked, but its job can."""
    holder = current_holder(paths)
    if holder is None or holder.job is None or cluster.problem:
        return holder
    return holder if any(job.job == holder.job and not job.waiting for job in cluster.live) else None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One line of a list of runs."""

    name: str
    directory: str
    state: State | None
    """None: the directory cannot be read as a run."""
    steps: int
    done: int
    seconds: float
    """Sum of the steps' durations."""
    problem: str
    """Why it cannot be read."""
    live_jobs: list[str] = field(default_factory=list)
    """Jobs of the cluster that wait or run for it, by name."""


def summarize_run(paths: RunPaths, cluster: ClusterView | None = None) -> RunSummary:
    """One line of a list of runs; a damaged run is listed with its problem."""
    try:
        status = read_status(paths, cluster)
    except MilesError as error:
        return RunSummary(paths.root.name, str(paths.root), None, 0, 0, 0.0, error.message)
    done = sum(step.state is State.DONE for step in status.steps)
    seconds = sum(step.seconds or 0.0 for step in status.steps)
    live = [job.name for job in status.cluster.live]
    return RunSummary(paths.root.name, str(paths.root), status.state, len(status.steps), done, seconds, "", live)


def step_status(
    planned: PlannedStep, attempts: list[Attempt], *, driven: bool, now: float, queued: bool = False
) -> StepStatus:
    """State of one step from its plan and its attempts.

    `driven`: a live process drives the run; `queued`: a job for the step waits, or has only just begun.
    """
    last = attempts[-1] if attempts else None
    reason = last.reason if last else None
    started = last.started if last else None
    note = last.note if last else ""
    state, seconds, detail = State.PENDING, None, planned.why
    if last and last.ended is None:
        state = State.RUNNING if driven else State.KILLED
        seconds = now - last.started if driven else None
        detail = "" if driven else "its process is gone and left no word"
    elif planned.done:
        state, seconds, detail = State.DONE, planned.done.seconds, ""
    elif last and last.ended is not None and reason is not EndReason.FINISHED:
        state = State.STOPPED if reason in ENDED_IN_ORDER else State.FAILED
        seconds, detail = last.ended - last.started, last.detail
    if queued and state not in (State.RUNNING, State.DONE):
        state = State.QUEUED
    return StepStatus(planned.name, planned.kind, state, len(attempts), started, seconds, reason, detail, note)


def run_state(steps: list[StepStatus], *, driven: bool) -> State:
    """State of a run from the states of its steps."""
    if driven:
        return State.RUNNING
    if all(step.state is State.DONE for step in steps):
        return State.DONE
    for state in (State.QUEUED, State.FAILED, State.KILLED, State.STOPPED):
        if any(step.state is state for step in steps):
            return state
    return State.PENDING
