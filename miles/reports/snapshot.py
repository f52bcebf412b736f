"""What the terminal view shows, gathered from a run directory at one instant. Reads, and draws nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

from miles.runs.metrics import MetricsLine, read_metrics
from miles.runs.paths import RunPaths
from miles.runs.progress import Progress, read_progress
from miles.workflow.saved import newest_checkpoint
from miles.workflow.stage import STAGES
from miles.workflow.status import ClusterView, RunStatus, State, StepStatus, read_status

_SCORES = ("eval/reward", "eval/pass@")


@dataclass(frozen=True, slots=True)
class LastCheckpoint:
    """The newest checkpoint of a stage."""

    stage: str
    step: int
    seconds: float
    """Its age."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one instant."""

    status: RunStatus
    progress: Progress | None
    """Of the running step; None when nothing runs or it has not said anything yet."""
    metrics: list[MetricsLine]
    saved: LastCheckpoint | None = None
    """Of the stage that runs, or that ended before it was done; None: it has none."""

    @property
    def running(self) -> StepStatus | None:
        """The step that runs."""
        return next((step for step in self.status.steps if step.state is State.RUNNING), None)

    @property
    def shown(self) -> StepStatus | None:
        """The step whose figures are shown: the running one when it has any, else the last with any."""
        stages = {line.stage for line in self.metrics}
        if self.running is not None and self.running.name in stages:
            return self.running
        return next((step for step in reversed(self.status.steps) if step.name in stages), None)

    @property
    def recorded_steps(self) -> int:
        """Training steps that the running stage has finished."""
        return sum(line.step > 0 for line in self.lines_of(self.running.name)) if self.running else 0

    def lines_of(self, stage: str) -> list[MetricsLine]:
        """Metrics of one stage, by step."""
        return [line for line in self.metrics if line.stage == stage]


@dataclass(frozen=True, slots=True)
class Change:
    """An evaluation figure before and after a stage."""

    stage: str
    name: str
    before: float
    after: float

    @property
    def improved(self) -> bool:
        return self.after > self.before


def take_snapshot(paths: RunPaths, cluster: ClusterView | None = None) -> Snapshot:
    """Read the run directory; `cluster` says what the cluster knows about the run's jobs."""
    status = read_status(paths, cluster)
    running = {step.name for step in status.steps if step.state is State.RUNNING}
    progress = read_progress(paths)
    if progress is not None and progress.stage not in running:
        progress = None
    return Snapshot(status, progress, read_metrics(paths), _last_checkpoint(paths, status))


def _last_checkpoint(paths: RunPaths, status: RunStatus) -> LastCheckpoint | None:
    """A step that is done has its outputs: its checkpoints are of interest no more."""
    for step in reversed(status.steps):
        if step.kind in STAGES and step.state is not State.DONE:
            newest = newest_checkpoint(paths, step.name)
            if newest is not None:
                number, created = newest
                return LastCheckpoint(step.name, number, max(0.0, time.time() - created))
    return None


def series(lines: list[MetricsLine], name: str) -> list[float]:
    """The values of one metric, where it was recorded."""
    return [line.values[name] for line in lines if name in line.values]


def evaluation_changes(snapshot: Snapshot) -> list[Change]:
    """Reward and pass@k, first and last, of every stage that evaluated at least twice."""
    changes = []
    for step in snapshot.status.steps:
        lines = snapshot.lines_of(step.name)
        names = dict.fromkeys(name for line in lines for name in line.values if name.startswith(_SCORES))
        for name in names:
            values = series(lines, name)
            if len(values) > 1:
                changes.append(Change(step.name, name.removeprefix("eval/"), values[0], values[-1]))
    return changes
