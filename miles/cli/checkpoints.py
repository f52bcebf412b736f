"""Commands about saved state: checkpoints, save, export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles.cli.common import JsonOption, RunArgument, print_json, print_next, run_argument, stdout
from miles.cli.resume import FromOption, StageOption
from miles.errors import RunError

if TYPE_CHECKING:
    from miles.workflow.saved import Saved

_SHOWN_METRICS = ("reward/mean", "loss", "eval/reward", "eval/pass@1")


def checkpoints(
    run: RunArgument = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its checksum.")] = False,
    json: JsonOption = False,
) -> None:
    """List the checkpoints of a run, and why each is kept."""
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from miles.config.load import load_resolved
    from miles.runs.directory import find_run
    from miles.workflow.saved import list_checkpoints

    paths = find_run(run)
    console = stdout()
    found = list_checkpoints(paths, load_resolved(paths.root), verify=verify)
    if json:
        print_json([asdict(saved) for saved in found])
        return
    name = run_argument(paths.root)
    if not found:
        console.print(f"run '{paths.root.name}' has no checkpoints")
        print_next(console, (f"miles status {name}", "where it stands"))
        return
    columns = ("stage", "step", "size", "age", "saved in", "metrics", "kept because", "state")
    table = Table(*columns, box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for saved in found:
        state = Text("damaged", "bold red") if saved.damage else Text("intact" if verify else "", "green")
        table.add_row(saved.stage, str(saved.step), *_figures(saved), ", ".join(saved.kept), state)
    console.print(table)
    for line in (line for saved in found for line in saved.damage):
        console.print(f"damaged: {line}", markup=False, soft_wrap=True)
    _print_next(name, found)


def _figures(saved: Saved) -> tuple[str, str, str, str]:
    """Size, age, duration of the save and metrics; empty where the manifest does not tell."""
    from miles.reports.terminal import duration

    if saved.bytes is None or saved.created is None:
        return "", "", "", ""
    metrics = "  ".join(f"{key} {saved.metrics[key]:.3f}" for key in _SHOWN_METRICS if key in saved.metrics)
    age = duration(max(0.0, time.time() - saved.created))
    return f"{saved.bytes / 2**20:.1f} MiB", age, f"{saved.save_seconds:.1f} s", metrics


def _print_next(name: str, found: list[Saved]) -> None:
    newest = found[-1]
    print_next(
        stdout(),
        (f"miles resume {name} --stage {newest.stage} --from {newest.step}", "go on from one of them"),
        (f"miles export {name} OUT --stage {newest.stage} --from {newest.step}", "write it as a Hugging Face model"),
    )


def save(
    run: RunArgument = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds to wait for it.")] = 1800.0,
) -> None:
    """Have a running stage save a checkpoint now, and wait for it.

    It is saved after the training step that is being done. Ctrl-C takes the request back.
    """
    from miles.runs.directory import find_run
    from miles.workflow.saved import save_now

    paths = find_run(run)
    console = stdout()
    with console.status("waiting for the end of the training step"):
        saved = save_now(paths, timeout=timeout)
    console.print(f"saved step {saved.step} of '{saved.stage}' in {saved.save_seconds:.1f} s")
    console.print(saved.directory, soft_wrap=True)
    name = run_argument(paths.root)
    print_next(
        console, (f"miles checkpoints {name}", "all that are kept"), (f"miles stop {name}", "stop the run, if you like")
    )


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name under ./runs, or a run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")],
    stage: StageOption = None,
    from_: FromOption = None,
) -> None:
    """Write a checkpoint as a Hugging Face model directory.

    Without --from the newest checkpoint of the stage. The run stays as it is, and may be running.
    """
    from miles.config.load import load_resolved
    from miles.runs.directory import find_run
    from miles.workflow.child import run_child
    from miles.workflow.going_back import parse_step
    from miles.workflow.saved import choose_checkpoint

    paths = find_run(run)
    if out.exists():
        raise RunError(f"{out} exists", fix="name a directory that does not exist yet")
    step = None if from_ is None else parse_step(from_)
    name, number = choose_checkpoint(paths, load_resolved(paths.root), stage, step)
    console = stdout()
    with console.status(f"reading the checkpoint of step {number} of '{name}'"):
        arguments = ["--run-dir", str(paths.root), "--stage", name, "--step", str(number)]
        run_child("miles.training.export", [*arguments, "--output", str(out.absolute())], "the export")
    console.print(f"wrote {out}: '{name}' after step {number}", soft_wrap=True)
    print_next(console, ("miles init", f'write a run file, whose model = "{out}"'))
