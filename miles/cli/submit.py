"""`miles submit`: start a run, or continue it, on Slurm or on this machine."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from miles.cli.common import AtOnceOption, FileArgument, SetOption, SweepOption, stdout
from miles.cli.driving import drive, refuse_if_busy, submit_jobs
from miles.cli.sweeping import refuse_without_sweep, submit_sweep
from miles.errors import ConfigError


def submit(
    file: FileArgument,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, in processes of its own.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="With --local: return at once; the run goes on when the terminal closes.")
    ] = False,
    set_: SetOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an existing run of this name aside and start anew.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the jobs that would be submitted; submit and write nothing.")
    ] = False,
    sweep: SweepOption = None,
    at_once: AtOnceOption = None,
) -> None:
    """Start the run that FILE describes, or continue it, as jobs of Slurm or with --local here.

    Steps that are done are skipped, a step that was interrupted goes on from where it was. With --local, Ctrl-C asks
    the run to stop at the next boundary with everything saved, a second one ends it at once: nothing that is on disk
    is lost either way. With --sweep it is several runs, each with a name and a directory of its own: one job array for
    every step, or with --local one run after the other.
    """
    from miles.config.load import load_run
    from miles.workflow.prepare import prepare_run, preview_runs

    if dry_run and local:
        raise ConfigError("--dry-run shows jobs of Slurm, and --local has none", fix="leave one of them out")
    if dry_run and fresh:
        raise ConfigError("--dry-run changes nothing, and --fresh sets a run aside", fix="leave one of them out")
    refuse_without_sweep(sweep, at_once)
    if not local and shutil.which("sbatch") is None:
        raise ConfigError(
            "Slurm is not on this machine: there is no sbatch in PATH",
            fix=f"use a login node of the cluster; `miles submit {file} --local` runs it on this machine",
        )
    console = stdout()
    if sweep:
        submit_sweep(
            file, set_ or [], sweep, console, at_once=at_once, local=local, detach=detach, fresh=fresh, dry_run=dry_run
        )
        return
    if dry_run:
        from miles.cli.plan import show_plan

        with console.status("checking the run file, the model and the data"):
            config = load_run(file, set_ or [])
            (paths,) = preview_runs([config])
        show_plan(config, paths, console, file=file)
        return
    with console.status("checking the run file, the model and the data"):
        prepared = prepare_run(file, set_ or [], fresh=fresh, refuse_if_busy=refuse_if_busy)
    if local:
        again = f"miles submit {file} --local --set name=other --set seed=1"
        drive(prepared, console, detach=detach, last=(again, "the same with another seed"))
    else:
        submit_jobs(prepared, console)
