"""`miles submit`: start a run, or continue it."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from miles.cli.common import FileArgument, SetOption, print_next, run_argument, stdout
from miles.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from miles.cluster.local import Driver
    from miles.runs.paths import RunPaths


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

    Steps that are done are skipped. Ctrl-C asks the run to stop at the next boundary, a second one ends it
    at once.
    """
    if not local:
        raise ConfigError(
            "submitting to Slurm is not in this version yet",
            fix=f"`miles submit {file} --local` runs it on this machine",
        )
    from miles.cluster.local import start_driver
    from miles.reports.watch import watch_run
    from miles.workflow.prepare import prepare_run

    console = stdout()
    with console.status("checking the run file, the model and the data"):
        prepared = prepare_run(file, set_ or [], fresh=fresh)
    name = run_argument(prepared.paths.root)
    if prepared.set_aside is not None:
        console.print(f"the earlier run is now {prepared.set_aside}", soft_wrap=True)
    console.print(f"run directory: {prepared.paths.root}", soft_wrap=True)
    driver = start_driver(prepared.paths)
    if detach:
        console.print(f"started in the background, process {driver.pid}")
        print_next(
            console,
            (f"miles watch {name}", "follow it"),
            (f"miles logs {name} -f", "read its logs"),
            (f"miles stop {name}", "stop it"),
        )
        return
    watch_run(prepared.paths, console, running=_StopOnSignal(driver, console).running)
    _finish(prepared.paths, driver, console, file)


class _StopOnSignal:
    """Ctrl-C, and whatever else ends this process, asks the driver to stop; the view goes on until it has."""

    def __init__(self, driver: Driver, console: Console) -> None:
        self._driver = driver
        self._console = console
        self._asked = False
        self._said = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask)

    def running(self) -> bool:
        """Whether the driver runs; says once that it was asked to stop."""
        if self._asked and not self._said:
            self._said = True
            message = "stopping at the next boundary; Ctrl-C again ends everything at once"
            self._console.print(message, style="yellow")
        return self._driver.running()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._driver.stop()


def _finish(paths: RunPaths, driver: Driver, console: Console, file: Path) -> None:
    from miles.reports.watch import print_summary

    failure = driver.failure()
    if failure is not None:
        raise failure
    name = run_argument(paths.root)
    print_summary(paths, console)
    print_next(
        console,
        (f"miles report {name}", "the report"),
        (f"miles status {name}", "steps, times, attempts"),
        (f"miles submit {file} --local --set name=other --set seed=1", "the same with another seed"),
    )
