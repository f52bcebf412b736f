"""What Slurm says about the jobs of one run, put beside our own ledger. Asks Slurm; changes nothing.

Slurm being down, absent, or having forgotten a job is no error here: the ledger alone still tells what was submitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.jobs import JobRecord, read_jobs
from miles.cluster.slurm.states import Job, JobState
from miles.errors import MilesError
from miles.runs.paths import RunPaths
from miles.workflow.status import ClusterView, JobStatus


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """A submission, and the job as Slurm knows it."""

    record: JobRecord
    job: Job | None
    """None: Slurm has forgotten it, or could not be asked."""

    @property
    def live(self) -> bool:
        """Whether Slurm says that it waits or runs."""
        return self.job is not None and self.job.state.live

    @property
    def waiting(self) -> bool:
        """Whether it has not begun, or waits to begin again."""
        return self.job is not None and self.job.state.waiting

    @property
    def running(self) -> bool:
        """Whether it has nodes, and is not about to give them back."""
        return self.live and not self.waiting and self.job is not None and self.job.state is not JobState.COMPLETING

    def __str__(self) -> str:
        """`job 12 (step grpo)`."""
        return f"job {self.record.id} (step {self.record.step})"


@dataclass(frozen=True, slots=True)
class Queue:
    """All submissions of a run, oldest first."""

    jobs: list[SubmittedJob]
    problem: str = ""
    """Why Slurm could not be asked."""

    @property
    def live(self) -> list[SubmittedJob]:
        """Those that wait or run."""
        return [job for job in self.jobs if job.live]

    @property
    def running(self) -> list[SubmittedJob]:
        """Those that have nodes, and are not about to give them back."""
        return [job for job in self.jobs if job.running]

    @property
    def waiting(self) -> list[SubmittedJob]:
        """Those that wait for nodes, a dependency or a time."""
        return [job for job in self.live if job.waiting]


def onlooker() -> Slurm:
    """Slurm for those who only want to see: one question, not for long."""
    return Slurm(timeout=15.0, patience=0.0)


def ask(paths: RunPaths, slurm: Slurm) -> Queue:
    """The run's jobs as they are now. Raises what asking Slurm raises."""
    (queue,) = ask_all([paths], slurm)
    return queue


def ask_all(runs: Sequence[RunPaths], slurm: Slurm) -> list[Queue]:
    """The same for many runs with one question."""
    return _queues([read_jobs(paths) for paths in runs], slurm)


def look(paths: RunPaths, connect: Callable[[], Slurm] = onlooker) -> Queue | None:
    """The run's jobs, as far as Slurm can be asked; None for a run that was never submitted to Slurm."""
    records = read_jobs(paths)
    return _look_all([records], connect)[0] if records else None


def cluster_view(paths: RunPaths, connect: Callable[[], Slurm] = onlooker) -> ClusterView:
    """What Slurm says about the run's jobs, for `miles.workflow.status`."""
    queue = look(paths, connect)
    return ClusterView() if queue is None else _view(queue)


def cluster_views(runs: Sequence[RunPaths], connect: Callable[[], Slurm] = onlooker) -> list[ClusterView]:
    """The same for many runs with one question. A run whose ledger of jobs is damaged counts as one without jobs."""
    ledgers: list[list[JobRecord]] = []
    for paths in runs:
        try:
            ledgers.append(read_jobs(paths))
        except MilesError:
            ledgers.append([])  # `miles status` says what is wrong with it
    return [_view(queue) for queue in _look_all(ledgers, connect)]


def _queues(ledgers: Sequence[list[JobRecord]], slurm: Slurm) -> list[Queue]:
    ids = [record.id for ledger in ledgers for record in ledger]
    known = slurm.jobs(ids) if ids else {}
    return [Queue([SubmittedJob(record, known.get(record.id)) for record in ledger]) for ledger in ledgers]


def _look_all(ledgers: Sequence[list[JobRecord]], connect: Callable[[], Slurm]) -> list[Queue]:
    if not any(ledgers):
        return [Queue([]) for _ in ledgers]
    try:
        return _queues(ledgers, connect())
    except MilesError as error:
        return [Queue([SubmittedJob(record, None) for record in ledger], error.message) for ledger in ledgers]


class ViewOfQueue:
    """The same for those who ask again and again: Slurm is asked every few seconds only."""

    def __init__(self, paths: RunPaths, *, every: float) -> None:
        """`every`: seconds between two questions."""
        self._paths = paths
        self._every = every
        self._asked = float("-inf")
        self._view = ClusterView()

    def __call__(self) -> ClusterView:
        """What Slurm last said."""
        if time.monotonic() - self._asked > self._every:
            self._view = cluster_view(self._paths)
            self._asked = time.monotonic()
        return self._view


def _view(queue: Queue) -> ClusterView:
    return ClusterView([_status(job) for job in queue.jobs], queue.problem)


def _status(submitted: SubmittedJob) -> JobStatus:
    record, job = submitted.record, submitted.job
    return JobStatus(
        step=record.step,
        job=record.job if job is None else job.id,
        name=str(record.id),
        kind=record.kind.value,
        submitted=record.time,
        state="" if job is None else job.state.value,
        live=submitted.live,
        waiting=submitted.waiting,
        reason="" if job is None else job.reason,
        restarts=0 if job is None else job.restarts,
        nodes=[] if job is None else list(job.nodes),
        started=None if job is None else job.start,
        ends=None if job is None else job.end_limit,
    )
