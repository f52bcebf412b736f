"""`miles doctor`: looks at this machine and its cluster; `miles init --site` writes what Slurm says into a profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles.cli.common import JsonOption, print_json, print_next, stdout

if TYPE_CHECKING:
    from miles.cluster.checks import Check

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}

DirectoryArgument = Annotated[Path, typer.Argument(metavar="[DIR]", help="Where runs are to lie; none: ./runs.")]


def doctor(directory: DirectoryArgument = Path("runs"), json: JsonOption = False) -> None:
    """Check this machine and its cluster.

    Exit code 1 when a run would fail here; warnings and what is absent are none.
    """
    from dataclasses import asdict

    from miles.cluster.checks import Status
    from miles.cluster.doctor import examine

    if json:
        checks = list(examine(directory))
        print_json([asdict(check) for check in checks])
    else:
        checks = []
        for check in examine(directory):
            checks.append(check)
            _print(check)
        _summary(checks)
    if any(check.status is Status.FAIL for check in checks):
        raise typer.Exit(1)


def write_site_profile(file: Path | None) -> None:
    """Write the profile of the cluster; never over a file. Raises RunError."""
    from miles.cluster.doctor import found_runtimes
    from miles.cluster.slurm.commands import Slurm
    from miles.cluster.slurm.profile import site_profile
    from miles.cluster.slurm.site_checks import read_site
    from miles.errors import RunError
    from miles.runs.files import disk_errors, write_new

    site = read_site(Slurm(timeout=20, patience=0))
    target = file or Path("sites") / f"{site.name}.toml"
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_new(target, site_profile(site, found_runtimes(), str(target)))
        except FileExistsError:
            raise RunError(f"{target} exists", fix="name another file: `miles init --site FILE`") from None
    console = stdout()
    console.print(f"wrote {target}, the profile of cluster {site.name}", soft_wrap=True)
    print_next(
        console,
        (f"$EDITOR {target}", "set the account, and what else the site wants"),
        ("miles init run.toml", f'a run file; extends = "{target}" takes the profile'),
    )


def _print(check: Check) -> None:
    from rich.text import Text

    console = stdout()
    head = Text.assemble((f"{check.status.value:<5}", STYLES[check.status]), f"{check.name:<17}", check.message)
    console.print(head, soft_wrap=True)
    if check.remedy:
        console.print(Text.assemble(" " * 22, ("fix: ", "bold"), check.remedy), soft_wrap=True)


def _summary(checks: list[Check]) -> None:
    from miles.cluster.checks import Status

    counts = {status: sum(check.status == status for check in checks) for status in STYLES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console = stdout()
    console.print(told)
    if any(check.name == "slurm" and check.status is not Status.SKIP for check in checks) and not counts["fail"]:
        print_next(console, ("miles init --site", "write a profile of the cluster that runs can extend"))
    elif not counts["fail"]:
        print_next(console, ("miles init", "write a run file to start from"))
