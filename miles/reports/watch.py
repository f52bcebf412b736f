"""Following a run in the terminal until it ends: a live view, or plain lines where output goes to a file.

Owns the loops only. `miles.reports.snapshot` reads the run, `miles.reports.terminal` draws it. Nothing here
changes the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from miles.reports.snapshot import Snapshot, evaluation_changes, take_snapshot
from miles.reports.terminal import changes_table, duration, job_remark, plain_line, run_view
from miles.runs.paths import RunPaths
from miles.workflow.status import ClusterView, State

_REFRESH_SECONDS = 0.5
_PLAIN_SECONDS = 2.0


def watch_run(
    paths: RunPaths,
    console: Console,
    *,
    running: Callable[[], bool],
    cluster: Callable[[], ClusterView] = ClusterView,
) -> None:
    """Show a run while `running()`, and once more when it has ended; `cluster` says what is known about its jobs."""

    def look() -> Snapshot:
        return take_snapshot(paths, cluster())

    if console.is_terminal:
        _follow_live(look, console, running)
    else:
        _follow_plain(look, console, running)


def print_summary(paths: RunPaths, console: Console) -> None:
    """What came out of the run."""
    snapshot = take_snapshot(paths)
    steps = snapshot.status.steps
    seconds = sum(step.seconds or 0.0 for step in steps)
    done = sum(step.state is State.DONE for step in steps)
    console.print(f"{snapshot.status.name}: {done} of {len(steps)} steps done in {duration(seconds)}")
    changes = evaluation_changes(snapshot)
    if changes:
        console.print(changes_table(changes))
    if paths.report.exists():
        console.print(f"report: {paths.report}", soft_wrap=True)


def _follow_live(look: Callable[[], Snapshot], console: Console, running: Callable[[], bool]) -> None:
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def draw() -> None:
            live.update(run_view(look(), width=console.width), refresh=True)

        draw()
        while running():
            time.sleep(_REFRESH_SECONDS)
            draw()
        draw()


def _follow_plain(look: Callable[[], Snapshot], console: Console, running: Callable[[], bool]) -> None:
    log = _PlainLog(console)
    log.write(look())
    while running():
        time.sleep(_PLAIN_SECONDS)
        log.write(look())
    log.write(look())


class _PlainLog:
    """Prints what is new since the last snapshot: states of steps, evaluations, the newest training step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._states: dict[str, State] = {}
        self._jobs: dict[str, tuple[str, int, str]] = {}
        self._printed = 0

    def write(self, snapshot: Snapshot) -> None:
        self._write_jobs(snapshot)
        self._write_states(snapshot, begun=True)
        self._write_metrics(snapshot)
        self._write_states(snapshot, begun=False)

    def _write_jobs(self, snapshot: Snapshot) -> None:
        """Print jobs of the cluster whose state has changed since the last snapshot, unless that is their end."""
        for job in snapshot.status.cluster.live:
            told = (job.state, job.restarts, job.reason if job.waiting else "")
            if self._jobs.get(job.name) == told:
                continue
            self._jobs[job.name] = told
            remark = job_remark(job, now=time.time())
            self._print(f"job {job.name} of step {job.step}: {job.state.lower()}{f' ({remark})' if remark else ''}")

    def _write_states(self, snapshot: Snapshot, *, begun: bool) -> None:
        """Print steps that have begun to run since the last snapshot, or those that have ended."""
        for step in snapshot.status.steps:
            changed = self._states.get(step.name) is not step.state
            if not changed or (step.state is State.RUNNING) is not begun:
                continue
            first = step.name not in self._states
            self._states[step.name] = step.state
            if first and step.state not in (State.RUNNING, State.DONE):
                continue  # how an earlier attempt ended
            remark = f" ({step.note})" if begun and step.note else ""
            if not begun and step.seconds is not None:
                remark = f" after {duration(step.seconds)}"
            self._print(f"step {step.name}: {step.state.value}{remark}")

    def _write_metrics(self, snapshot: Snapshot) -> None:
        new = snapshot.metrics[self._printed :]
        self._printed = len(snapshot.metrics)
        for position, line in enumerate(new, start=1):
            if position == len(new) or any(name.startswith("eval/") for name in line.values):
                self._print(plain_line(snapshot, line))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
