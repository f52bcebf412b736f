"""The state of a run and of its steps, read from its directory: the ledger, done.json and the claim."""

from __future__ import annotations

import time
from dataclasses import dataclass
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
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    """Asked to stop."""
    KILLED = "killed"
    """Its process is gone and left no word."""


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

    @property
    def failed_step(self) -> StepStatus | None:
        """The step that ended a failed, stopped or killed run."""
        ended = (State.FAILED, State.STOPPED, State.KILLED)
        return next((step for step in self.steps if step.state in ended), None)


def read_status(paths: RunPaths, *, now: float | None = None) -> RunStatus:
    """State of a run as its directory tells it."""
    config = load_resolved(paths.root)
    holder = current_holder(paths)
    attempts = read_attempts(paths)
    now = time.time() if now is None else now
    driven = holder is not None
    steps = [
        step_status(planned, [a for a in attempts if a.step == planned.name], driven=driven, now=now)
        for planned in plan_run(config, paths)
    ]
    return RunStatus(config.name, str(paths.root), run_state(steps, driven=driven), holder, steps)


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


def summarize_run(paths: RunPaths) -> RunSummary:
    """One line of a list of runs; a damaged run is listed with its problem."""
    try:
        status = read_status(paths)
    except MilesError as error:
        return RunSummary(paths.root.name, str(paths.root), None, 0, 0, 0.0, error.message)
    done = sum(step.state is State.DONE for step in status.steps)
    seconds = sum(step.seconds or 0.0 for step in status.steps)
    return RunSummary(paths.root.name, str(paths.root), status.state, len(status.steps), done, seconds, "")


def step_status(planned: PlannedStep, attempts: list[Attempt], *, driven: bool, now: float) -> StepStatus:
    """State of one step from its plan and its attempts; `driven`: a live process drives the run."""
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
        state = State.STOPPED if reason in (EndReason.STOPPED, EndReason.TIME_LIMIT) else State.FAILED
        seconds, detail = last.ended - last.started, last.detail
    return StepStatus(planned.name, planned.kind, state, len(attempts), started, seconds, reason, detail, note)


def run_state(steps: list[StepStatus], *, driven: bool) -> State:
    """State of a run from the states of its steps."""
    if driven:
        return State.RUNNING
    if all(step.state is State.DONE for step in steps):
        return State.DONE
    for state in (State.FAILED, State.KILLED, State.STOPPED):
        if any(step.state is state for step in steps):
            return state
    return State.PENDING
