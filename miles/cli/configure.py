"""Commands about run files and this installation: config check, explain and show, init, version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miles.cli.common import FileArgument, JsonOption, SetOption, print_json, print_next, stdout
from miles.cli.doctor import write_site_profile
from miles.errors import RunError

app = typer.Typer(help="Check, explain and show run files.", no_args_is_help=True)


@app.command("check")
def check(file: FileArgument, set_: SetOption = None) -> None:
    """Check a run file.

    Shows every problem at once, with its line. Starts nothing and needs no torch.
    """
    from miles.config.load import load_run

    config = load_run(file, set_ or [])
    console = stdout()
    steps = ", ".join(f"{name} ({step.kind})" for name, step in config.steps.items())
    console.print(f"{file} is good: run '{config.name}' with steps {steps}", soft_wrap=True)
    print_next(
        console,
        (f"miles submit {file} --local", "run it on this machine"),
        (f"miles config show {file}", "every key as it is resolved"),
    )


@app.command("explain")
def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key (train.lr, lr), a section or a kind of step.")],
    json: JsonOption = False,
) -> None:
    """Explain a key of the run file."""
    from dataclasses import asdict

    from rich.text import Text

    from miles.config.explain import explain as explain_key

    explanation = explain_key(key)
    if json:
        print_json(asdict(explanation))
        return
    facts = {"type": explanation.type, "default": explanation.default, "bounds": explanation.bounds}
    facts |= {"written in": "\n            ".join(explanation.written_in)}
    if explanation.may_change is not None:
        facts |= {
            "may change": "yes, also in a run that exists" if explanation.may_change else "no, not in a run that exists"
        }
    facts |= {"keys": ", ".join(explanation.keys)}
    console = stdout()
    console.print(Text(explanation.key, "bold"))
    console.print(Text(explanation.text))
    for name, fact in facts.items():
        if fact:
            console.print(Text.assemble((f"{name:<12}", "dim"), fact))


@app.command("show")
def show(file: FileArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Print a run file with all defaults filled in."""
    from miles.config.load import dump_resolved, load_run

    config = load_run(file, set_ or [])
    if json:
        print_json(config.model_dump(mode="json"))
    else:
        typer.echo(dump_resolved(config), nl=False)


def init(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Where to write it; none: run.toml, or sites/CLUSTER.toml with --site."),
    ] = None,
    site: Annotated[
        bool, typer.Option("--site", help="Write the profile of this cluster instead, which run files can extend.")
    ] = False,
) -> None:
    """Write a commented run file to start from.

    Never overwrites a file.
    """
    if site:
        write_site_profile(file)
        return
    from miles.config.template import commented_config
    from miles.runs.files import disk_errors, write_new

    file = file or Path("run.toml")
    with disk_errors(file):
        try:
            write_new(file, commented_config())
        except FileExistsError:
            raise RunError(f"{file} exists", fix="name another file: `miles init FILE`") from None
    console = stdout()
    console.print(f"wrote {file}", soft_wrap=True)
    print_next(
        console,
        (f"$EDITOR {file}", "set model, data and rewards"),
        (f"miles config check {file}", "check it"),
    )


def version(json: JsonOption = False) -> None:
    """Print the versions of Miles and its parts."""
    import platform
    from importlib import metadata

    import miles

    versions: dict[str, str | None] = {"miles": miles.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "megatron-core", "sglang"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    if json:
        print_json(versions)
        return
    for name, number in versions.items():
        typer.echo(f"{name} {number or '(not installed)'}")
