"""Submitting a run: one job for every step that is to do, each after those that it needs, one at a time.

Owns the order and the dependencies of the jobs, and handing them over. What a script says belongs to
`miles.cluster.slurm.render`, what a step is and whether it is done to `miles.workflow`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.ids import JobId
from miles.cluster.slurm.jobs import JobKind, JobRecord, append_job, read_jobs
from miles.cluster.slurm.queue import SubmittedJob, ask_all
from miles.cluster.slurm.render import check_script, render_job
from miles.cluster.slurm.spec import job_spec
from miles.config.load import load_resolved
from miles.config.schema import RunConfig
from miles.errors import MilesError, RunError
from miles.runs.claim import Claim, current_holder
from miles.runs.files import disk_errors, write_atomic
from miles.runs.paths import RunPaths
from miles.workflow.graph import needed_steps
from miles.workflow.plan import plan_run

_MOST_RUNS = 10
"""Runs of a sweep that one message names."""


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One job before it is submitted. Other jobs of the plan go by their position in it."""

    step: str
    successor: bool
    """Whether it is there to take over from the job before it, which has the same step."""
    after_success: tuple[int, ...]
    """Jobs that must have ended well: the last ones of the steps that this one needs."""
    after_end: int | None
    """The job before it, however it ends: one process drives a run at a time."""

    def dependency(self, jobs: Sequence[int], *, success: str = "afterok") -> str | None:
        """The dependency as sbatch takes it, from the ids of the jobs before it in the plan.

        `success`: its word for jobs that must have ended well.
        """
        conditions = []
        if self.after_success:
            conditions.append(f"{success}:" + ":".join(str(jobs[position]) for position in self.after_success))
        if self.after_end is not None and self.after_end not in self.after_success:
            conditions.append(f"afterany:{jobs[self.after_end]}")
        return ",".join(conditions) or None


def plan_jobs(config: RunConfig, paths: RunPaths) -> list[PlannedJob]:
    """The jobs of the steps that are to do, in order.

    A step that restarts by a chain gets all its jobs at once. Its last job finds nothing to do when the step is done,
    so that what needs the step waits for that one.
    """
    jobs: list[PlannedJob] = []
    last: dict[str, int] = {}
    for planned in plan_run(config, paths):
        if planned.done is not None:
            continue
        step = config.steps[planned.name]
        needs = tuple(sorted(last[name] for name in needed_steps(step) if name in last))
        count = step.slurm.chain_length if step.slurm.restart == "chain" else 1
        for number in range(count):
            before = len(jobs) - 1 if jobs else None
            jobs.append(PlannedJob(planned.name, number > 0, needs, before))
        last[planned.name] = len(jobs) - 1
    return jobs


def submit_run(paths: RunPaths, slurm: Slurm) -> list[JobRecord]:
    """Submit the run's jobs, recording each at once; returns their records, none when everything is done.

    Raises RunError when jobs of the run wait or run, when a process drives it, and when Slurm refuses a job: those
    before it stay submitted, and the message names them.
    """
    config = load_resolved(paths.root)
    submitted_before = {record.step for record in read_jobs(paths)}
    jobs = plan_jobs(config, paths)
    for step in dict.fromkeys(job.step for job in jobs):
        # A mistake in the script of a later step is told before the first job is submitted.
        check_script(render_job(job_spec(config, step, paths, dependency=None)))
    records: list[JobRecord] = []

    def submit(job: PlannedJob) -> None:
        kind = JobKind.CHAIN if job.successor else JobKind.FIRST
        if kind is JobKind.FIRST and job.step in submitted_before:
            kind = JobKind.RESUME
        records.append(_submit(paths, slurm, config, job, kind, records))

    # The claim keeps a second submit out until the first job is on record; the job itself begins after that.
    with claimed([paths], slurm):
        if jobs:
            submit(jobs[0])
    for job in jobs[1:]:
        submit(job)
    return records


@contextmanager
def claimed(runs: Sequence[RunPaths], slurm: Slurm) -> Iterator[None]:
    """All runs claimed, and ready to be submitted. Raises RunError when one goes on somewhere."""
    with ExitStack() as claims:
        live = live_ids(runs, slurm)
        for paths in runs:
            claims.enter_context(Claim.acquire(paths, live_jobs=live))
        refuse_live_jobs(runs, slurm)
        for paths in runs:
            paths.stop_request.unlink(missing_ok=True)
            with disk_errors(paths.scripts):
                paths.scripts.mkdir(exist_ok=True)
        yield


def live_ids(runs: Sequence[RunPaths], slurm: Slurm) -> frozenset[int]:
    """Numbers of the jobs that have not ended, of those on the runs' records and those that hold the runs."""
    ids: set[JobId] = {record.id for paths in runs for record in read_jobs(paths)}
    holders = map(current_holder, runs)
    ids |= {holder.job for holder in holders if holder is not None and holder.job is not None}
    return frozenset(job.id for job in slurm.jobs(ids).values() if job.state.live) if ids else frozenset()


def refuse_live_jobs(runs: Sequence[RunPaths], slurm: Slurm) -> None:
    """Raise RunError when jobs of one of the runs wait or run."""
    busy = {paths.root.name: queue.live for paths, queue in zip(runs, ask_all(runs, slurm), strict=True) if queue.live}
    if not busy:
        return
    lines = []
    for name, live in list(busy.items())[:_MOST_RUNS]:
        lines.append(f"run '{name}' is on Slurm already:")
        lines += [f"  {_since(submitted)}" for submitted in live]
    if len(busy) > _MOST_RUNS:
        lines.append(f"and so are {len(busy) - _MOST_RUNS} more runs")
    name = next(iter(busy))
    raise RunError(
        "\n".join(lines), fix=f"`miles watch {name}` shows it, `miles stop {name}` ends it with everything saved"
    )


def _since(submitted: SubmittedJob) -> str:
    """A live job with its state, and when it was submitted."""
    assert submitted.job is not None
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(submitted.record.time))
    reason = f", {submitted.job.reason}" if submitted.waiting and submitted.job.reason else ""
    return f"{submitted}: {submitted.job.state.value}{reason}, submitted {since}"


def _submit(
    paths: RunPaths, slurm: Slurm, config: RunConfig, planned: PlannedJob, kind: JobKind, before: list[JobRecord]
) -> JobRecord:
    """Write the script of one job, hand it over, record it."""
    step, dependency = planned.step, planned.dependency([record.job for record in before])
    spec = job_spec(config, step, paths, dependency=dependency)
    script = paths.script(step)
    try:
        write_atomic(script, render_job(spec), mode=0o600)
        job = slurm.submit(script)
    except MilesError as error:
        if not before:
            raise
        name = paths.root.name
        rest = f"`miles resume {name}` submits the rest; `miles stop {name}` ends them"
        raise partly_submitted(error, [f"{record.job} ({record.step})" for record in before], rest) from error
    record = JobRecord(step, job, kind, str(script), time.time(), dependency)
    append_job(paths, record)
    return record


def partly_submitted(error: MilesError, jobs: Sequence[str], rest: str) -> MilesError:
    """An error of one submission that names the jobs before it. `rest`: how the others are submitted later."""
    return type(error)(
        f"{error.message}\nthe jobs before it are submitted and go on: {', '.join(jobs)}",
        fix=f"{error.fix or 'see the message'}; then, when these jobs have ended, {rest}",
    )
