"""What accounting still knows about jobs that the controller has forgotten, where a site has accounting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.ids import parse_job_id
from miles.cluster.slurm.queue import onlooker
from miles.cluster.slurm.states import Job
from miles.workflow.status import ClusterView, JobStatus


def with_history(view: ClusterView, connect: Callable[[], Slurm] = onlooker) -> ClusterView:
    """The view with how each run of the forgotten jobs ended; as it is where there is no accounting."""
    forgotten = [job for job in view.jobs if not job.state]
    if not forgotten:
        return view
    runs = connect().accounted(parse_job_id(job.name) for job in forgotten)
    ends = {str(name): jobs for name, jobs in runs.items()}
    return replace(view, jobs=[_remembered(job, ends.get(job.name, [])) if not job.state else job for job in view.jobs])


def _remembered(job: JobStatus, runs: list[Job]) -> JobStatus:
    if not runs:
        return job
    last = runs[-1]
    return replace(
        job,
        state=last.state.value,
        restarts=len(runs) - 1,
        nodes=list(last.nodes),
        started=last.start,
        ends=last.end_limit,
        runs=[run.state.value for run in runs],
    )
