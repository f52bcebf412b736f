"""`miles render`: the batch scripts that `miles submit` would hand over."""

from __future__ import annotations

from typing import Annotated

import typer

from miles.cli.common import AtOnceOption, FileArgument, SetOption, SweepOption
from miles.cli.sweeping import refuse_without_sweep
from miles.errors import ConfigError, did_you_mean


def render(
    file: FileArgument,
    step: Annotated[
        str | None, typer.Option("--step", metavar="NAME", help="The script of this step only; none: of every step.")
    ] = None,
    set_: SetOption = None,
    sweep: SweepOption = None,
    at_once: AtOnceOption = None,
) -> None:
    """Print the batch scripts that `miles submit FILE` would hand over, and create nothing.

    Only the dependencies on other jobs are missing: their numbers come with the submission. With --sweep these are the
    scripts of the job arrays, each before those of the runs that its elements execute.
    """
    from miles.cluster.slurm.arrays import render_sweep
    from miles.cluster.slurm.render import check_script, render_job
    from miles.cluster.slurm.spec import job_spec
    from miles.config.load import load_run
    from miles.config.sweep import load_sweep
    from miles.runs.directory import run_directory

    refuse_without_sweep(sweep, at_once)
    swept = load_sweep(file, set_ or [], sweep) if sweep else None
    config = load_run(file, set_ or []) if swept is None else swept.members[0]
    names = list(config.steps) if swept is None else swept.steps
    if step is not None and step not in names:
        message = f"step '{step}': {file} has no such step.{did_you_mean(step, names)}"
        raise ConfigError(message, fix=f"the steps are {', '.join(names)}")
    scripts: list[str] = []
    for name in names if step is None else [step]:
        if swept is not None:
            scripts += render_sweep(swept, name, at_once)
            continue
        scripts.append(render_job(job_spec(config, name, run_directory(config), dependency=None)))
        check_script(scripts[-1])
    typer.echo("\n".join(scripts), nl=False)
