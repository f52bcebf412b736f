"""Rehearsing a preemption: what a real one sends, sent to exactly one running job of the run.

As real Slurm was seen to do it (docs/architecture.md, section 6). Needs no rights but those on one's own job, except
for a node that fails, which only an administrator can declare.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.queue import ask
from miles.cluster.slurm.states import Job
from miles.errors import MilesError, RunError
from miles.runs.paths import RunPaths

POLL_SECONDS = 0.5


class Preemption(StrEnum):
    """What happens to the job."""

    TERM = "term"
    """SIGTERM to the processes, the end after the grace: the default of Slurm."""
    USR1 = "usr1"
    """SIGUSR1 to the batch script, the end after the grace: sites with preempt_send_user_signal."""
    KILL = "kill"
    """SIGKILL without a word: no grace, or a power cut."""
    NODE = "node"
    """The last of its nodes is declared down."""


def preempt_run(
    paths: RunPaths, slurm: Slurm, kind: Preemption, *, grace: float, say: Callable[[str], None] = lambda text: None
) -> Job:
    """Preempt the run's running job and return it as it is then: ended, or back in the queue.

    Raises RunError when no job of the run runs, and what Slurm says where it refuses.
    """
    running = ask(paths, slurm).running
    if not running:
        name = paths.root.name
        raise RunError(f"run '{name}' has no running job to preempt", fix=f"`miles status {name}` shows its jobs")
    job = running[0].job
    assert job is not None
    match kind:
        case Preemption.TERM:
            slurm.cancel([job.name], signal="TERM")
            return _end_after(slurm, job, grace, say)
        case Preemption.USR1:
            slurm.cancel([job.name], signal="USR1", batch=True)
            return _end_after(slurm, job, grace, say)
        case Preemption.KILL:
            slurm.kill_processes(job.name)
            return _end_after(slurm, job, grace, say)
        case Preemption.NODE:
            node = job.nodes[-1]
            slurm.set_down(node, reason="miles preempt")
            say(f"node {node} is declared down; `scontrol update NodeName={node} State=RESUME` undoes it")
    return _now(slurm, job)


def _end_after(slurm: Slurm, job: Job, grace: float, say: Callable[[str], None]) -> Job:
    """Wait for the job to leave by itself; when the grace is over it is put back into the queue, as Slurm does."""
    asked = time.monotonic()
    while time.monotonic() - asked < grace:
        time.sleep(POLL_SECONDS)
        current = _now(slurm, job)
        if not _same_run(job, current):
            say(f"it left by itself after {time.monotonic() - asked:.0f} s")
            return current
    say(f"it had not left after {grace:g} s")
    _requeue(slurm, job, say)
    return _now(slurm, job)


def _requeue(slurm: Slurm, job: Job, say: Callable[[str], None]) -> None:
    try:
        slurm.requeue(job.name)
    except MilesError as error:
        # As where preemption cancels: the run goes on in a successor or by `miles resume`.
        say(f"it cannot be requeued ({error.message}); it is cancelled")
        slurm.cancel([job.name])


def _same_run(job: Job, current: Job) -> bool:
    return current.state.live and current.state == job.state and current.restarts == job.restarts


def _now(slurm: Slurm, job: Job) -> Job:
    return slurm.jobs([job.name]).get(job.name, job)
