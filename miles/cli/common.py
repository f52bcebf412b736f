"""What the commands share: arguments, consoles, JSON, the line that says what to type next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from miles.runs.paths import RunPaths
    from miles.workflow.status import ClusterView

ASK_SLURM_SECONDS = 10.0
"""How often a view that goes on asks Slurm: its controller serves everybody."""

RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="Name under ./runs, or a run directory; none: the newest run."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file; repeatable."),
]
SweepOption = Annotated[
    list[str] | None,
    typer.Option("--sweep", metavar="KEY=A,B,...", help="A run for each value; repeatable: for each combination."),
]
AtOnceOption = Annotated[
    int | None,
    typer.Option("--at-once", metavar="N", min=1, help="With --sweep: jobs of one step that run at the same time."),
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).")]


def stdout() -> Console:
    """The console for people."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(value: Any) -> None:
    """One JSON document for scripts."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_next(console: Console, *commands: tuple[str, str]) -> None:
    """What to type next: commands, each with what it does; never wrapped, so that they can be copied."""
    from rich.text import Text

    width = max(len(command) for command, _ in commands)
    for command, meaning in commands:
        line = Text.assemble(("next: ", "dim"), (command.ljust(width), "bold"), (f"  # {meaning}", "dim"))
        console.print(line, soft_wrap=True)


def run_argument(run_dir: Path) -> str:
    """How a person names this run in the next command: by name where that finds it."""
    by_name = Path("runs").absolute() / run_dir.name
    return run_dir.name if by_name == run_dir else str(run_dir)


def continue_command(run_dir: Path) -> str:
    """The command that continues a run from its directory."""
    return f"miles resume {run_argument(run_dir)}"


def on_slurm(paths: RunPaths) -> bool:
    """Whether the run was ever submitted to Slurm."""
    return paths.scripts.exists()


def cluster_views(paths: RunPaths, *, every: float = ASK_SLURM_SECONDS) -> Callable[[], ClusterView]:
    """Gives what Slurm says about the run's jobs, asking it every few seconds only; nothing for a run without jobs."""
    from miles.workflow.status import ClusterView

    if not on_slurm(paths):
        return ClusterView
    from miles.cluster.slurm.queue import ViewOfQueue

    return ViewOfQueue(paths, every=every)


def views_of_runs(runs: Sequence[RunPaths]) -> list[ClusterView]:
    """What Slurm says about the jobs of many runs, asked once; not asked when none was ever submitted."""
    from miles.workflow.status import ClusterView

    if not any(map(on_slurm, runs)):
        return [ClusterView() for _ in runs]
    from miles.cluster.slurm.queue import cluster_views

    return cluster_views(runs)


def run_is_live(paths: RunPaths, views: Callable[[], ClusterView]) -> Callable[[], bool]:
    """Whether a process drives the run, or jobs of it wait or run."""
    from miles.runs.claim import current_holder

    def live() -> bool:
        view = views()
        if view.jobs and not view.problem:
            return bool(view.live) or driven_here(paths)
        return current_holder(paths) is not None

    return live


def driven_here(paths: RunPaths) -> bool:
    """Whether a process drives the run that belongs to no job."""
    from miles.runs.claim import current_holder

    holder = current_holder(paths)
    return holder is not None and holder.job is None
