"""The `miles` command: puts the commands together and turns errors into one panel and an exit code.

Nothing heavy is imported before a command runs, so that help and completion answer at once. Help is plain
text, because importing what draws its panels takes longer than everything else together.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from miles.cli import checkpoints, configure, container, doctor, journal, render, resume, run, slurm, submit
from miles.errors import Interrupted, MilesError

app = typer.Typer(
    name="miles",
    help="Reinforcement-learning post-training for language models: submit a run, watch it, read its report.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("submit")(submit.submit)
app.command("render")(render.render)
app.command("resume")(resume.resume)
app.command("fork")(resume.fork)
app.command("watch")(run.watch)
app.command("status")(run.status)
app.command("explain")(slurm.explain)
app.command("logs")(run.logs)
app.command("stop")(run.stop)
app.command("preempt")(slurm.preempt)
app.command("save")(checkpoints.save)
app.command("checkpoints")(checkpoints.checkpoints)
app.command("export")(checkpoints.export)
app.command("report")(run.report)
app.command("runs")(run.runs)
app.command("init")(configure.init)
app.command("doctor")(doctor.doctor)
app.add_typer(configure.app, name="config")
app.add_typer(container.app, name="container")
app.add_typer(journal.app, name="journal")
app.command("version")(configure.version)


@app.callback()
def global_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the Python traceback of an error. Anywhere on the line.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> NoReturn:
    """Entry point of the console script."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="miles")
    except MilesError as error:
        if debug:
            raise
        _print_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) went away: nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _print_error(
            MilesError(
                f"{type(error).__name__}: {error}",
                fix="this is a fault of Miles: the same command with --debug shows where; please report it",
            )
        )
        sys.exit(1)
    sys.exit(0)


def _print_error(error: MilesError) -> None:
    """One panel on stderr: what is wrong, and what to do about it."""
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.text import Text

    stopped = isinstance(error, Interrupted)
    title, style, remedy = ("stopped", "yellow", "next: ") if stopped else ("error", "red", "fix: ")
    parts = [Text(error.message)]
    if error.fix is not None:
        parts.append(Text.assemble((remedy, "bold"), error.fix))
    Console(stderr=True, highlight=False).print(
        Panel(Group(*parts), title=title, title_align="left", border_style=style)
    )
