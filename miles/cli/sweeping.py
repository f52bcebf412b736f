"""`miles submit --sweep`: several runs from one run file, as job arrays of Slurm or one after the other here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miles.cli.common import print_next, run_argument
from miles.cli.driving import drive, introduce, refuse_if_busy
from miles.errors import ConfigError, Interrupted, MilesError

if TYPE_CHECKING:
    from rich.console import Console

    from miles.config.sweep import Sweep
    from miles.workflow.prepare import Prepared


def refuse_without_sweep(sweep: Sequence[str] | None, at_once: int | None) -> None:
    """Raise ConfigError for an option that means nothing alone."""
    if at_once is not None and not sweep:
        raise ConfigError(
            "--at-once is about the runs of a sweep", fix="write --sweep KEY=A,B as well, or leave it out"
        )


def submit_sweep(
    file: Path,
    overrides: Sequence[str],
    sweeps: Sequence[str],
    console: Console,
    *,
    at_once: int | None,
    local: bool,
    detach: bool,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Start or continue the runs of a sweep. Everything that can be checked of all of them is checked first."""
    from miles.config.sweep import load_sweep
    from miles.workflow.prepare import prepare_runs, preview_runs

    if local and detach:
        raise ConfigError(
            "--detach with --sweep: this process starts one run after the other",
            fix="leave --detach out, for example in `tmux`, or submit the runs one by one",
        )
    if local and at_once is not None:
        raise ConfigError("--at-once with --local: the runs go one after the other here", fix="leave one of them out")
    with console.status("checking the run file, the models and the data"):
        sweep = load_sweep(file, overrides, sweeps)
        if not local:
            _check_arrays(sweep, at_once, patient=not dry_run)
        if dry_run:
            preview_runs(sweep.members)
        else:
            prepared = prepare_runs(sweep.members, fresh=fresh, refuse_if_busy=refuse_if_busy)
    if dry_run:
        from miles.cli.plan import show_arrays
        from miles.cluster.slurm.arrays import plan_arrays

        words = [f"--set {shlex.quote(word)}" for word in overrides] + [
            f"--sweep {shlex.quote(word)}" for word in sweeps
        ]
        words += [f"--at-once {at_once}"] * (at_once is not None)
        show_arrays(plan_arrays(sweep, at_once), console, command=f"miles submit {file} {' '.join(words)}")
    elif local:
        _drive_all(prepared, console)
    else:
        _submit_all(sweep, prepared, at_once, console)


def _check_arrays(sweep: Sweep, at_once: int | None, *, patient: bool) -> None:
    from miles.cluster.slurm.arrays import check_size, render_sweep
    from miles.cluster.slurm.commands import Slurm, SlurmDown, SlurmMissing

    for step in sweep.steps:
        render_sweep(sweep, step, at_once)
    try:
        check_size(len(sweep.members), Slurm() if patient else Slurm(patience=0.0))
    except (SlurmDown, SlurmMissing):
        if patient:
            raise  # the plan of a dry run says it where it asks when the jobs would start


def _submit_all(sweep: Sweep, prepared: Sequence[Prepared], at_once: int | None, console: Console) -> None:
    from miles.cluster.slurm.arrays import plan_arrays, submit_arrays
    from miles.cluster.slurm.commands import Slurm

    for one in prepared:
        if one.set_aside is not None or one.changes:
            introduce(one, console)
    console.print(f"{len(prepared)} runs in {sweep.directory.parent}: {_names(prepared)}", markup=False, soft_wrap=True)
    with console.status("submitting"):
        arrays = submit_arrays(plan_arrays(sweep, at_once), Slurm())
    list_runs = (
        "miles runs" if sweep.directory.parent == Path("runs").absolute() else f"miles runs {sweep.directory.parent}"
    )
    if not arrays:
        console.print("every run is done: nothing is submitted")
        print_next(console, (list_runs, "list them"))
        return
    for array in arrays:
        console.print(str(array), markup=False, soft_wrap=True)
    name = run_argument(prepared[0].paths.root)
    print_next(
        console,
        (list_runs, "list them"),
        (f"miles watch {name}", "follow one of them"),
        (f"miles stop {name}", "stop one of them with everything saved"),
    )


def _names(prepared: Sequence[Prepared]) -> str:
    first, last = prepared[0].paths.root.name, prepared[-1].paths.root.name
    return first if len(prepared) == 1 else f"{first} to {last}"


def _drive_all(prepared: Sequence[Prepared], console: Console) -> None:
    """Drive one run after the other; one that fails does not keep the others. Raises the first one's error."""
    failed: list[tuple[str, MilesError]] = []
    for number, one in enumerate(prepared, start=1):
        name = run_argument(one.paths.root)
        console.print(f"run {number} of {len(prepared)}: {one.paths.root.name}", style="bold", markup=False)
        try:
            drive(one, console, detach=False, last=(f"miles checkpoints {name}", "what is saved"))
        except Interrupted:
            raise
        except MilesError as error:
            console.print(f"failed: {error.message}", style="red", markup=False, soft_wrap=True)
            failed.append((name, error))
    if failed:
        name, first = failed[0]
        names = ", ".join(name for name, _ in failed)
        raise type(first)(
            f"{len(failed)} of {len(prepared)} runs failed: {names}\n{first.message}",
            fix=f"`miles explain {name}` tells more; the same command continues what is not done",
        )
