"""`miles render`: the batch scripts that `miles submit` would hand over."""

from __future__ import annotations

from typing import Annotated

import typer

from miles.cli.common import FileArgument, SetOption
from miles.errors import ConfigError, did_you_mean


def render(
    file: FileArgument,
    step: Annotated[
        str | None, typer.Option("--step", metavar="NAME", help="The script of this step only; none: of every step.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Print the batch scripts that `miles submit FILE` would hand over, and create nothing.

    Only the dependencies on other jobs are missing: their numbers come with the submission.
    """
    from miles.cluster.slurm.render import check_script, render_job
    from miles.cluster.slurm.spec import job_spec
    from miles.config.load import load_run
    from miles.runs.directory import run_directory

    config = load_run(file, set_ or [])
    names = list(config.steps)
    if step is not None and step not in names:
        message = f"step '{step}': {file} has no such step.{did_you_mean(step, names)}"
        raise ConfigError(message, fix=f"the steps are {', '.join(names)}")
    paths = run_directory(config)
    for number, name in enumerate(names if step is None else [step]):
        script = render_job(job_spec(config, name, paths, dependency=None))
        check_script(script)
        typer.echo("\n" * (number > 0) + script, nl=False)
