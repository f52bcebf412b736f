"""What the commands share: arguments, consoles, JSON, the line that says what to type next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="Name under ./runs, or a run directory; none: the newest run."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file; repeatable."),
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
