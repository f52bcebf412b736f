"""Submitting the runs of a sweep: one job array for every step that is to do, whose elements are the runs.

Each run keeps its own directory, script, ledger and claim, and every element is a job like any other: preempted,
requeued, stopped and continued by itself. Owns which runs share an array, and handing the arrays over. What a single
run's jobs are belongs to `miles.cluster.slurm.submit`, what the scripts say to `miles.cluster.slurm.render`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.jobs import JobKind, JobRecord, append_job, read_jobs
from miles.cluster.slurm.render import check_script, render_array, render_job
from miles.cluster.slurm.spec import ArraySpec, JobSpec, array_spec, job_spec
from miles.cluster.slurm.submit import PlannedJob, claimed, partly_submitted, plan_jobs
from miles.config.schema import RunConfig
from miles.config.sweep import Sweep
from miles.errors import ConfigError, MilesError
from miles.runs.directory import run_directory
from miles.runs.files import disk_errors, write_atomic
from miles.runs.paths import RunPaths


@dataclass(frozen=True, slots=True)
class Member:
    """One run of a sweep."""

    index: int
    """Of its element in every array."""
    config: RunConfig
    paths: RunPaths


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that have the same jobs to do.

    Only they share arrays: `aftercorr` never lets an element begin whose counterpart there is not.
    """

    jobs: tuple[PlannedJob, ...]
    members: tuple[Member, ...]

    @property
    def held_by_user(self) -> bool:
        """Whether the run file asks for a first job that waits until somebody releases it."""
        return "hold" in self.members[0].config.steps[self.jobs[0].step].slurm.extra


@dataclass(frozen=True, slots=True)
class ArrayPlan:
    """A sweep before it is submitted."""

    sweep: Sweep
    groups: list[Group]
    at_once: int | None
    """Elements of one array that may run at the same time; None: all."""

    @property
    def members(self) -> list[Member]:
        """The runs that have something to do."""
        return [member for group in self.groups for member in group.members]

    def spec(self, jobs: Mapping[int, JobSpec], dependency: str | None = None) -> ArraySpec:
        """The array of one step's jobs (`job_specs`)."""
        return array_spec(self.sweep.name, self.sweep.directory, jobs, at_once=self.at_once, dependency=dependency)


@dataclass(frozen=True, slots=True)
class SubmittedArray:
    """An array that Slurm has accepted."""

    step: str
    array: int
    runs: int
    dependency: str | None

    def __str__(self) -> str:
        """`job array 53: step grpo of 3 runs, aftercorr:52`."""
        of = "1 run" if self.runs == 1 else f"{self.runs} runs"
        return f"job array {self.array}: step {self.step} of {of}{f', {self.dependency}' if self.dependency else ''}"


def job_specs(members: Sequence[Member], step: str) -> dict[int, JobSpec]:
    """The job of one step of each run, by the index of its element. Raises ConfigError as `job_spec` does."""
    return {member.index: job_spec(member.config, step, member.paths, dependency=None) for member in members}


def render_sweep(sweep: Sweep, step: str, at_once: int | None) -> list[str]:
    """The script of the array of one step, whether or not it is done, then those that its elements run.

    Raises ConfigError where the runs cannot be one array, and for a script that cannot be rendered or read.
    """
    configs = [(index, config) for index, config in enumerate(sweep.members) if step in config.steps]
    members = [Member(index, config, run_directory(config)) for index, config in configs]
    if any(config.steps[step].slurm.restart == "chain" for _, config in configs):
        raise ConfigError(
            f"step '{step}': slurm.restart = \"chain\" with --sweep: a job array has no successors",
            fix="--set 'slurm.restart=\"requeue\"', or submit the runs one by one",
        )
    jobs = job_specs(members, step)
    scripts = [render_array(ArrayPlan(sweep, [], at_once).spec(jobs)), *map(render_job, jobs.values())]
    # The runs differ in quoted words only: what bash cannot read in one, it can read in none.
    for script in scripts[:2]:
        check_script(script)
    return scripts


def check_size(count: int, slurm: Slurm) -> None:
    """Raise ConfigError when the site allows no array with so many elements. Raises what asking Slurm raises."""
    allowed = slurm.config().get("MaxArraySize", "")
    if allowed.isdecimal() and count > int(allowed):
        raise ConfigError(
            f"--sweep makes {count} runs; a job array has at most {allowed} elements here (MaxArraySize)",
            fix="submit parts of it, one after the other",
        )


def plan_arrays(sweep: Sweep, at_once: int | None) -> ArrayPlan:
    """The arrays of what is to do in the runs."""
    groups: dict[tuple[PlannedJob, ...], list[Member]] = {}
    for index, config in enumerate(sweep.members):
        paths = run_directory(config)
        if jobs := tuple(plan_jobs(config, paths)):
            groups.setdefault(jobs, []).append(Member(index, config, paths))
    return ArrayPlan(sweep, [Group(jobs, tuple(members)) for jobs, members in groups.items()], at_once)


def submit_arrays(plan: ArrayPlan, slurm: Slurm) -> list[SubmittedArray]:
    """Submit the arrays, recording each in all its runs at once; none when everything is done.

    Raises RunError when jobs of a run wait or run, when a process drives one, and when Slurm refuses an array: those
    before it stay submitted, and the message names them.
    """
    with disk_errors(plan.sweep.directory):
        plan.sweep.directory.mkdir(mode=0o700, exist_ok=True)
    runs = [member.paths for member in plan.members]
    submission = _Submission(plan, slurm, {paths.root: {record.step for record in read_jobs(paths)} for paths in runs})
    # The claims keep a second submit out until every run has a job on record. For many runs that takes longer than
    # Slurm needs to start a job, which would find its run claimed: the first arrays are held meanwhile.
    try:
        with claimed(runs, slurm):
            for group in plan.groups:
                submission.submit(group, group.jobs[0], hold=True)
    finally:
        submission.release()
    for group in plan.groups:
        for job in group.jobs[1:]:
            submission.submit(group, job)
    return submission.arrays


@dataclass(frozen=True, slots=True)
class _Submission:
    """The arrays of a plan that Slurm has so far."""

    plan: ArrayPlan
    slurm: Slurm
    before: Mapping[Path, Collection[str]]
    """Steps that were submitted earlier, by run directory."""
    arrays: list[SubmittedArray] = field(default_factory=list)
    _held: list[int] = field(default_factory=list)
    _of_group: dict[tuple[PlannedJob, ...], list[int]] = field(default_factory=dict)
    """Numbers of the arrays of each group, in the order of its jobs."""

    def submit(self, group: Group, job: PlannedJob, *, hold: bool = False) -> None:
        """Write the scripts of one array and of its elements, hand it over, and record it in its runs."""
        earlier = self._of_group.setdefault(group.jobs, [])
        dependency = job.dependency(earlier, success="aftercorr")
        try:
            array = self._hand_over(group, job.step, dependency, hold=hold)
        except MilesError as error:
            if not self.arrays:
                raise
            rest = "the same command submits the rest; `miles stop RUN` ends one of the runs"
            raise partly_submitted(error, [f"{one.array} ({one.step})" for one in self.arrays], rest) from error
        earlier.append(array)
        if hold and not group.held_by_user:
            self._held.append(array)
        self.arrays.append(SubmittedArray(job.step, array, len(group.members), dependency))
        _record(group, self.arrays[-1], self.before)

    def release(self) -> None:
        """Let the arrays begin that are held for us."""
        for array in self._held:
            self.slurm.release(array)

    def _hand_over(self, group: Group, step: str, dependency: str | None, *, hold: bool) -> int:
        jobs = job_specs(group.members, step)
        for member in group.members:
            # The array's script starts it as a program, so that its own first line counts.
            write_atomic(member.paths.script(step), render_job(jobs[member.index]), mode=0o700)
        script = self.plan.sweep.directory / f"{step}.sbatch"
        write_atomic(script, render_array(self.plan.spec(jobs, dependency)), mode=0o600)
        return self.slurm.submit(script, hold=hold)


def _record(group: Group, array: SubmittedArray, before: Mapping[Path, Collection[str]]) -> None:
    """Write the line of each run's element. `before`: steps that were submitted earlier, by run directory."""
    now = time.time()
    for member in group.members:
        kind = JobKind.RESUME if array.step in before[member.paths.root] else JobKind.FIRST
        script = str(member.paths.script(array.step))
        append_job(member.paths, JobRecord(array.step, array.array, kind, script, now, array.dependency, member.index))
