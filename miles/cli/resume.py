"""`miles resume` and `miles fork`: go on with a run, from where it is or from an earlier step, or beside it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from miles.cli.common import RunArgument, SetOption, on_slurm, print_next, run_argument, stdout
from miles.cli.driving import drive, refuse_if_busy, submit_jobs
from miles.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from miles.workflow.going_back import GoingBack

FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="STEP", help="A checkpoint to go on from (40 or step-000040), or `start`."),
]
StageOption = Annotated[
    str | None,
    typer.Option("--stage", metavar="NAME", help="The step of kind sft or rl that --from means; none: the last one."),
]


def resume(
    run: RunArgument = None,
    from_: FromOption = None,
    stage: StageOption = None,
    restart: Annotated[
        str | None, typer.Option("--restart", metavar="NAME", help="Let this stage begin again from its start.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key that may change; repeatable."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return at once; the run goes on when the terminal closes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before something is set aside.")] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Go on on this machine, also with a run that was submitted to Slurm.")
    ] = False,
) -> None:
    """Continue a run from its directory alone.

    It goes on from its newest checkpoint and journal, as `miles submit` with the same file does. With --from
    or --restart it goes back first; what comes after that is moved into discarded/, never deleted. A run that was
    submitted to Slurm goes on there.
    """
    from miles.config.load import load_resolved
    from miles.runs.directory import check_config, find_run
    from miles.workflow.going_back import choose_stage, go_back, parse_step, plan_going_back
    from miles.workflow.prepare import config_with, prepare_resume
    from miles.workflow.stage import opening_note

    if restart is not None and (from_ is not None or stage is not None):
        raise ConfigError("--restart names a stage itself", fix="use it without --from and --stage")
    if stage is not None and from_ is None:
        raise ConfigError("--stage says which stage --from means", fix=f"`--stage {stage} --from STEP`")
    paths = find_run(run)
    console = stdout()
    refuse_if_busy([paths])
    config = load_resolved(paths.root)
    check_config(paths, config_with(paths, set_ or []))
    if restart is not None or from_ is not None:
        name = choose_stage(paths, config, restart or stage)
        plan = plan_going_back(paths, config, name, 0 if from_ is None else parse_step(from_))
        _agree(plan, console, yes=yes)
        go_back(paths, plan)
    with console.status("checking the model and the data"):
        prepared = prepare_resume(paths, set_ or [])
    named = run_argument(paths.root)
    if not prepared.to_do:
        console.print(f"run '{paths.root.name}' is done")
        print_next(console, (f"miles report {named}", "the report"), (f"miles status {named}", "its steps"))
        return
    first = prepared.to_do[0]
    console.print(f"step {first.name}: {opening_note(paths, first) or 'starts from its beginning'}", soft_wrap=True)
    if on_slurm(paths) and not local:
        submit_jobs(prepared, console)
    else:
        drive(prepared, console, detach=detach, last=(f"miles checkpoints {named}", "what is saved"))


def _agree(plan: GoingBack, console: Console, *, yes: bool) -> None:
    """Say what going back sets aside, and ask where somebody can answer. Raises ConfigError where nobody can."""
    where = f"its checkpoint of step {plan.step}" if plan.step else "its beginning"
    console.print(f"'{plan.stage}' goes back to {where}", soft_wrap=True)
    for line in plan.set_aside:
        console.print(f"set aside: {line}", markup=False, soft_wrap=True)
    if yes or not plan.set_aside:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nobody is here to agree to that", fix="say --yes")
    typer.confirm("Go back?", abort=True)


def fork(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name under ./runs, or a run directory.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Name of the new run; it lies beside RUN.")],
    from_: FromOption = None,
    stage: StageOption = None,
    set_: SetOption = None,
) -> None:
    """Make a new run that goes on from a checkpoint of another.

    The new run has the same config but for --set, which may name any key; steps that are done are taken over.
    RUN stays as it is, and may be running.
    """
    from miles.runs.directory import find_run
    from miles.workflow.fork import fork_run
    from miles.workflow.going_back import parse_step

    source = find_run(run)
    forked = fork_run(source, new, set_ or [], stage=stage, step=None if from_ is None else parse_step(from_))
    if on_slurm(source):
        forked.paths.scripts.mkdir()  # it goes on where its source did
    console = stdout()
    console.print(f"run directory: {forked.paths.root}", soft_wrap=True)
    for name in forked.done:
        console.print(f"step {name}: done, taken over")
    if forked.stage is not None:
        console.print(f"step {forked.stage}: continues after step {forked.step}")
    for change in forked.changes:
        console.print(f"changed: {change}", markup=False, soft_wrap=True)
    name = run_argument(forked.paths.root)
    print_next(console, (f"miles resume {name}", "start it"), (f"miles status {name}", "look at it"))
