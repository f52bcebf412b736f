"""Commands about containers: build an image, check the one that a run file names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles.cli.common import FileArgument, JsonOption, SetOption, print_json, print_next, stdout

if TYPE_CHECKING:
    from miles.cluster.container_check import Check

app = typer.Typer(help="Build and check the container that a run's processes run in.", no_args_is_help=True)


@app.command("build")
def build(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="File to write; must not exist.")],
    definition: Annotated[
        Path | None, typer.Option("--def", metavar="FILE", help="Definition file; none: Miles' own.")
    ] = None,
) -> None:
    """Build an image with Apptainer or Singularity.

    Without --def it holds the pinned set that SGLang, Megatron and Miles were seen to run with together.
    """
    from miles.cluster.container_build import build_image

    build_image(image, definition)
    console = stdout()
    console.print(f"built {image}", soft_wrap=True)
    print_next(
        console,
        ("miles container check FILE", f'with [container] runtime = "apptainer", image = "{image}" in the run file'),
    )


@app.command("check")
def check(file: FileArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Try the containers that a run file names, on this machine.

    Exit code 1 when a check fails. What a GPU node sees is known there: run it in an allocation.
    """
    from dataclasses import asdict

    from miles.cluster.container_check import Outcome, check_run
    from miles.config.load import load_run

    found: list[tuple[str, Check]] = []
    console = stdout()
    shown: str | None = None
    for steps, each in check_run(load_run(file, set_ or [])):
        found.append((steps, each))
        if json:
            continue
        if steps != shown:
            console.print(f"container of {steps}", markup=False, soft_wrap=True)
            shown = steps
        style = "green" if each.outcome is Outcome.OK else "bold red"
        console.print(f"  [{style}]{each.outcome.value:<6}[/]  {each.name}: ", end="", soft_wrap=True)
        console.print(each.message, markup=False, soft_wrap=True)
        if each.remedy is not None:
            console.print(f"          fix: {each.remedy}", markup=False, soft_wrap=True)
    if json:
        print_json([{"steps": steps, **asdict(each)} for steps, each in found])
    elif not found:
        console.print('no step runs in a container: container.runtime is "none"')
    if any(each.outcome is Outcome.FAILED for _, each in found):
        raise typer.Exit(1)
    if not json:
        print_next(console, (f"miles submit {file}", "submit the run"))
