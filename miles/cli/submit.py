"""`miles submit`: start a run, or continue it."""

from __future__ import annotations

from typing import Annotated

import typer

from miles.cli.common import FileArgument, SetOption, stdout
from miles.cli.driving import drive
from miles.errors import ConfigError


def submit(
    file: FileArgument,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, in processes of its own.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return at once; the run goes on when the terminal closes.")
    ] = False,
    set_: SetOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an existing run of this name aside and start anew.")
    ] = False,
) -> None:
    """Start the run that FILE describes, or continue it.

    Steps that are done are skipped, a step that was interrupted goes on from where it was. Ctrl-C asks the
    run to stop at the next boundary with everything saved, a second one ends it at once: nothing that is
    on disk is lost either way.
    """
    if not local:
        raise ConfigError(
            "submitting to Slurm is not in this version yet",
            fix=f"`miles submit {file} --local` runs it on this machine",
        )
    from miles.workflow.prepare import prepare_run

    console = stdout()
    with console.status("checking the run file, the model and the data"):
        prepared = prepare_run(file, set_ or [], fresh=fresh)
    again = f"miles submit {file} --local --set name=other --set seed=1"
    drive(prepared, console, detach=detach, last=(again, "the same with another seed"))
