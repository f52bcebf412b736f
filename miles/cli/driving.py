"""Starting a prepared run, here or on Slurm: what `submit`, with and without a sweep, and `resume` share."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from miles.cli.common import on_slurm, print_next, run_argument
from miles.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from miles.cluster.local import Driver
    from miles.runs.paths import RunPaths
    from miles.workflow.prepare import Prepared


def drive(prepared: Prepared, console: Console, *, detach: bool, last: tuple[str, str]) -> None:
    """Start the run, and show it until it has ended unless it is detached.

    `last` is the command, with its meaning, that a run which is done ends with. Raises the MilesError that ended it.
    """
    from miles.cluster.local import start_driver
    from miles.config.load import load_resolved
    from miles.config.rules import refuse_ranks_of_one_node
    from miles.reports.watch import watch_run

    paths = prepared.paths
    refuse_ranks_of_one_node(load_resolved(paths.root))
    name = run_argument(paths.root)
    introduce(prepared, console)
    driver = start_driver(paths)
    if detach:
        console.print(f"started in the background, process {driver.pid}")
        print_next(
            console,
            (f"miles watch {name}", "follow it"),
            (f"miles logs {name} -f", "read its logs"),
            (f"miles stop {name}", "stop it"),
        )
        return
    watch_run(paths, console, running=_StopOnSignal(driver, console).running)
    _finish(paths, driver, console, last)


def submit_jobs(prepared: Prepared, console: Console) -> None:
    """Hand the run to Slurm, and return: it goes on by itself. Raises what submitting raises."""
    from miles.cluster.slurm.commands import Slurm
    from miles.cluster.slurm.submit import submit_run

    paths = prepared.paths
    name = run_argument(paths.root)
    introduce(prepared, console)
    with console.status("submitting"):
        records = submit_run(paths, Slurm())
    if not records:
        console.print(f"run '{paths.root.name}' is done: nothing is submitted")
        print_next(console, (f"miles report {name}", "the report"), (f"miles status {name}", "its steps"))
        return
    for record in records:
        after = f", {record.dependency}" if record.dependency else ""
        console.print(f"job {record.id}: step {record.step}{after}", markup=False, soft_wrap=True)
    print_next(
        console,
        (f"miles watch {name}", "follow it"),
        (f"miles logs {name} -f", "read its logs"),
        (f"miles stop {name}", "stop it with everything saved"),
    )


def refuse_if_busy(runs: Sequence[RunPaths]) -> None:
    """Raise RunError when a process drives one of the runs, or jobs of it wait or run on Slurm.

    A job that ended without a word leaves its claim, which processes elsewhere cannot judge: it is released here.
    """
    from miles.runs.claim import Claim, current_holder, refuse_any_held

    submitted = [paths for paths in runs if on_slurm(paths)]
    if submitted:
        from miles.cluster.slurm.commands import Slurm
        from miles.cluster.slurm.submit import live_ids, refuse_live_jobs

        slurm = Slurm()
        refuse_live_jobs(submitted, slurm)
        held = [
            paths for paths in submitted if (holder := current_holder(paths)) is not None and holder.job is not None
        ]
        live = live_ids(held, slurm)
        for paths in held:
            with Claim.acquire(paths, live_jobs=live):
                pass
    refuse_any_held(runs)


def introduce(prepared: Prepared, console: Console) -> None:
    """Say where the run is, and what became of an earlier one and of its config."""
    if prepared.set_aside is not None:
        console.print(f"the earlier run is now {prepared.set_aside}", soft_wrap=True)
    console.print(f"run directory: {prepared.paths.root}", soft_wrap=True)
    for change in prepared.changes:
        console.print(f"changed: {change}", markup=False, soft_wrap=True)


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


def _finish(paths: RunPaths, driver: Driver, console: Console, last: tuple[str, str]) -> None:
    from miles.reports.watch import print_summary

    failure = driver.failure()
    if isinstance(failure, Interrupted):
        raise Interrupted(failure.message, fix=f"the same command continues {_where(paths)}")
    if failure is not None:
        raise failure
    name = run_argument(paths.root)
    print_summary(paths, console)
    print_next(
        console, (f"miles report {name}", "the report"), (f"miles status {name}", "steps, times, attempts"), last
    )


def _where(paths: RunPaths) -> str:
    """Where a run that was stopped goes on, as far as its next step says it."""
    from miles.config.load import load_resolved
    from miles.workflow.plan import plan_run
    from miles.workflow.stage import read_state

    to_do = (planned for planned in plan_run(load_resolved(paths.root), paths) if planned.done is None)
    state = read_state(paths, next(to_do).name)
    return f"after {state}" if state.step else "the run"
