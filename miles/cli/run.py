"""Commands about runs that exist: watch, status, explain, logs, stop, report, runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from miles.cli.common import (
    JsonOption,
    RunArgument,
    cluster_views,
    continue_command,
    on_slurm,
    print_json,
    print_next,
    run_argument,
    run_is_live,
    stdout,
    views_of_runs,
)


def watch(run: RunArgument = None) -> None:
    """Follow a run live.

    Ctrl-C leaves the view; the run goes on.
    """
    from miles.reports.watch import print_summary, watch_run
    from miles.runs.directory import find_run

    paths = find_run(run)
    console = stdout()
    views = cluster_views(paths)
    live = run_is_live(paths, views)
    with contextlib.suppress(KeyboardInterrupt):
        watch_run(paths, console, running=live, cluster=views)
    name = run_argument(paths.root)
    if live():
        print_next(console, (f"miles watch {name}", "the run goes on: look again"), (f"miles stop {name}", "stop it"))
        return
    print_summary(paths, console)
    print_next(console, (f"miles status {name}", "steps, times, attempts"), (f"miles report {name}", "the report"))


def status(run: RunArgument = None, json: JsonOption = False) -> None:
    """Show the steps of a run and their figures."""
    from dataclasses import asdict

    from miles.reports.snapshot import take_snapshot
    from miles.reports.terminal import run_view
    from miles.runs.directory import find_run
    from miles.workflow.status import State

    paths = find_run(run)
    snapshot = take_snapshot(paths, cluster_views(paths)())
    if json:
        last = {line.stage: {"step": line.step, "values": line.values} for line in snapshot.metrics}
        progress = asdict(snapshot.progress) if snapshot.progress else None
        saved = asdict(snapshot.saved) if snapshot.saved else None
        print_json({**asdict(snapshot.status), "progress": progress, "last_checkpoint": saved, "last_metrics": last})
        return
    console = stdout()
    console.print(run_view(snapshot, width=console.width))
    name = run_argument(paths.root)
    match snapshot.status.state:
        case State.RUNNING | State.QUEUED:
            print_next(console, (f"miles watch {name}", "follow it"), (f"miles stop {name}", "stop it"))
        case State.DONE:
            print_next(console, (f"miles report {name}", "the report"))
        case _:
            print_next(
                console,
                (f"miles explain {name}", "why it ended"),
                (f"miles logs {name}", "what its processes said"),
                (continue_command(paths.root), "continue it"),
            )


def logs(
    run: RunArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the run is driven.")] = False,
    role: Annotated[
        str | None, typer.Option("--role", help="Only these processes: driver, job, engine, trainer or step.")
    ] = None,
    node: Annotated[str | None, typer.Option("--node", help="Only the processes of this node.")] = None,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, help="Attempt number; none: the newest that has such logs.")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Last lines of each log.")] = 100,
) -> None:
    """Print the logs of a run's processes."""
    from miles.runs.directory import find_run
    from miles.runs.logs import Choice, follow_logs, log_tails

    paths = find_run(run)
    choice = Choice(attempt, role, node)
    write = typer.echo
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            follow_logs(paths, choice, lines, write, running=run_is_live(paths, cluster_views(paths)))
        return
    texts = list(log_tails(paths, choice, lines))
    for text in texts or [f"run '{paths.root.name}' has no such logs" if role or attempt else "no logs yet"]:
        write(text)


def stop(
    run: RunArgument = None,
    now: Annotated[bool, typer.Option("--now", help="End everything at once, not at the next boundary.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds to wait for the end.")] = 180.0,
) -> None:
    """Stop a run and wait until it has ended.

    Everything that is needed to continue it is saved first; with --now only what is on disk already counts.
    """
    from miles.cli.common import driven_here
    from miles.runs.directory import find_run

    paths = find_run(run)
    console = stdout()
    name = run_argument(paths.root)
    if on_slurm(paths) and not driven_here(paths):
        from miles.cluster.slurm.commands import Slurm
        from miles.cluster.slurm.stop import stop_jobs

        with console.status("stopping"):
            jobs = stop_jobs(paths, Slurm(), now=now, timeout=timeout)
        console.print(f"run '{paths.root.name}' is stopped (it was {', '.join(map(str, jobs))})", soft_wrap=True)
    else:
        from miles.cluster.local import stop_run

        holder = stop_run(paths, now=now, timeout=timeout)
        console.print(f"run '{paths.root.name}' is stopped (it was process {holder.identity.pid})")
    print_next(
        console,
        (f"miles status {name}", "where it stands"),
        (continue_command(paths.root), "continue it"),
    )


def report(run: RunArgument = None, json: JsonOption = False) -> None:
    """Write the HTML report of a run.

    The run may be in any state, also running.
    """
    from miles.reports.html import write_report
    from miles.runs.directory import find_run

    paths = find_run(run)
    file = write_report(paths.root)
    if json:
        print_json({"report": str(file)})
        return
    console = stdout()
    console.print(f"report: {file}", soft_wrap=True)
    print_next(console, (f"xdg-open {file}", "look at it (or open it in a browser)"))


def runs(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Directory that holds runs.")] = Path("runs"),
    json: JsonOption = False,
) -> None:
    """List the runs of a directory.

    The one with the newest activity comes first.
    """
    from rich.table import Table
    from rich.text import Text

    from miles.reports.terminal import duration, state_text
    from miles.runs.directory import list_runs
    from miles.workflow.status import State, summarize_run

    listed = list_runs(directory)
    found = [summarize_run(paths, view) for paths, view in zip(listed, views_of_runs(listed), strict=True)]
    if json:
        from dataclasses import asdict

        print_json([asdict(entry) for entry in found])
        return
    console = stdout()
    if not found:
        console.print(f"no runs under {directory.absolute()}")
        print_next(console, ("miles init", "write a run file to start from"))
        return
    table = Table(
        "run", "state", "steps", "time", "job", box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for entry in found:
        state = state_text(entry.state) if entry.state is not None else Text("unreadable", "red")
        steps = f"{entry.done}/{entry.steps}" if entry.state is not None else entry.problem
        jobs = ", ".join(entry.live_jobs[:3]) + " ..." * (len(entry.live_jobs) > 3)
        table.add_row(entry.name, state, steps, duration(entry.seconds), jobs)
    console.print(table)
    running = next((entry for entry in found if entry.state in (State.RUNNING, State.QUEUED)), None)
    name = run_argument(Path((running or found[0]).directory))
    print_next(console, (f"miles watch {name}" if running else f"miles status {name}", "look at it"))
