"""`miles submit --dry-run`: the jobs that would be submitted, as people read them."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from miles.cli.common import print_next
from miles.errors import MilesError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from miles.cluster.slurm.arrays import ArrayPlan
    from miles.cluster.slurm.submit import PlannedJob
    from miles.config.schema import RunConfig
    from miles.runs.paths import RunPaths


_HOUSEKEEPING = ("--job-name", "--output", "--open-mode", "--export")
"""Options that ask for nothing; `miles render` shows them."""


def show_plan(config: RunConfig, paths: RunPaths, console: Console, *, file: Path) -> None:
    """Print each job with its dependencies, what it asks for, its command, and when Slurm would start it.

    A step's successors of a chain are one line. Raises ConfigError where a job cannot be rendered.
    """
    from miles.cluster.slurm.submit import plan_jobs

    jobs = plan_jobs(config, paths)
    console.print(f"run directory: {paths.root}", soft_wrap=True)
    if not jobs:
        console.print("every step is done: nothing would be submitted")
        return
    for position, job in enumerate(jobs):
        if not job.successor:
            _show_job(config, paths, jobs, position, console)
        elif not (position + 1 < len(jobs) and jobs[position + 1].successor):
            count = sum(other.successor for other in jobs if other.step == job.step)
            console.print(f"  and {count} successors, each after the end of the one before it")
    console.print("nothing was submitted, and nothing written")
    print_next(console, (f"miles submit {file}", "submit it"), (f"miles render {file}", "the scripts themselves"))


def show_arrays(plan: ArrayPlan, console: Console, *, command: str) -> None:
    """The same for a sweep, as `command` would submit it: each array with its runs."""
    from miles.cluster.slurm.arrays import job_specs
    from miles.cluster.slurm.render import render_array

    console.print(
        f"{len(plan.sweep.members)} runs; scripts and output of their arrays: {plan.sweep.directory}", soft_wrap=True
    )
    for group in plan.groups:
        names = ", ".join(member.paths.root.name for member in group.members)
        console.print(f"{len(group.members)} runs: {names}", markup=False, soft_wrap=True)
        for job in group.jobs:
            spec = plan.spec(job_specs(group.members, job.step))
            after = _after(job, group.jobs, " of the same run")
            runs = shlex.join(spec.job.command) + ", and so on" * (len(group.members) > 1)
            _show(job.step, after, runs, render_array(spec), console)
    if not plan.groups:
        console.print("every step of every run is done: nothing would be submitted")
        return
    console.print("nothing was submitted, and nothing written")
    render = command.replace("miles submit", "miles render", 1)
    print_next(console, (command, "submit it"), (render, "the scripts themselves"))


def _show_job(config: RunConfig, paths: RunPaths, jobs: list[PlannedJob], position: int, console: Console) -> None:
    from miles.cluster.slurm.render import render_job
    from miles.cluster.slurm.spec import job_spec

    job = jobs[position]
    spec = job_spec(config, job.step, paths, dependency=None)
    _show(job.step, _after(job, jobs), shlex.join(spec.command), render_job(spec), console)


def _after(job: PlannedJob, jobs: Sequence[PlannedJob], whose: str = "") -> str:
    """What a job waits for, in words."""
    after = [f"after '{jobs[other].step}'{whose} has ended well" for other in job.after_success]
    if job.after_end is not None and job.after_end not in job.after_success:
        after.append(f"after '{jobs[job.after_end].step}' has ended")
    return ", ".join(after)


def _show(step: str, after: str, runs: str, script: str, console: Console) -> None:
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    options = [option for option in options if not option.startswith(_HOUSEKEEPING)]
    rows = [("after", after), ("asks", " ".join(options)), ("runs", runs)]
    console.print(f"step {step}", style="bold", markup=False)
    for name, text in [*rows, ("starts", _estimate(script))]:
        if text:
            console.print(f"  {name:<7}{text}", markup=False, soft_wrap=True)


def _estimate(script: str) -> str:
    """When Slurm would start a job with this script now, or why it cannot say."""
    from miles.cluster.slurm.commands import Slurm

    with tempfile.TemporaryDirectory(prefix="miles-") as directory:
        file = Path(directory) / "job.sbatch"
        file.write_text(script, encoding="utf-8")
        try:
            return Slurm(patience=0.0).test_only(file)
        except MilesError as error:
            return f"not known: {error.message}"
