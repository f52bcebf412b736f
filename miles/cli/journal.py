"""Commands about the rollout journal: journal show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from miles.cli.common import JsonOption, RunArgument, print_json, print_next, run_argument, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from miles.runs.journal.show import GroupRow, StepRow

app = typer.Typer(help="Look into the journal of rollouts.", no_args_is_help=True)


@app.callback()
def journal() -> None:
    """Look into the journal of rollouts."""


@app.command("show")
def show(
    run: RunArgument = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Workflow step whose journal it is; none: the only one.")
    ] = None,
    step: Annotated[int | None, typer.Option("--step", min=1, help="Show the groups of this training step.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what was generated for each training step.

    Changes nothing; the run may be live.
    """
    from dataclasses import asdict

    from miles.runs.directory import find_run
    from miles.runs.journal.show import find_stage, show_step, show_steps

    paths = find_run(run)
    stage = find_stage(paths, stage)
    command = f"miles journal show {run_argument(paths.root)} --stage {stage}"
    console = stdout()
    if step is None:
        rows = show_steps(paths, stage)
        if json:
            print_json({"stage": stage, "steps": [asdict(row) for row in rows]})
            return
        console.print(_steps_table(rows))
        _print_damage(rows)
        if rows:
            print_next(console, (f"{command} --step {rows[-1].step}", "the groups of a step"))
        return
    view = show_step(paths, stage, step)
    if json:
        print_json({"stage": stage, **asdict(view.row), "groups": [asdict(group) for group in view.groups]})
        return
    console.print(_groups_table(view.groups))
    _print_damage([view.row])
    print_next(console, (command, "all steps"))


def _print_damage(rows: list[StepRow]) -> None:
    console = stdout()
    for row in rows:
        for problem in row.damaged:
            console.print(f"step {row.step}, damaged: {problem}", style="yellow", soft_wrap=True, markup=False)


def _steps_table(rows: list[StepRow]) -> Table:
    table = _table(
        "step", "trained", "carried", "dropped", "tokens", "off-policy", "bytes", "per token", "open", "segments"
    )
    for row in rows:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(row.dropped.items()))
        per_token = "" if row.bytes_per_token is None else f"{row.bytes_per_token:.2f}"
        groups = (str(row.trained), str(row.carried)) if row.decided else ("", "")
        still_open = ("", "") if row.decided else (str(row.open), str(row.segments))
        sizes = (f"{row.tokens:,}", f"{row.off_policy_tokens:,}", f"{row.bytes:,}")
        table.add_row(str(row.step), *groups, dropped, *sizes, per_token, *still_open)
    return table


def _groups_table(groups: list[GroupRow]) -> Table:
    from rich.text import Text

    table = _table("position", "prompt", "epoch", "staleness", "fate", "rewards", "lengths", "versions")
    for group in groups:
        rewards = " ".join("-" if reward is None else f"{reward:g}" for reward in group.rewards)
        lengths = " ".join(
            f"{length}{'' if reason else '…'}"
            for length, reason in zip(group.lengths, group.finish_reasons, strict=True)
        )
        versions = ", ".join(map(str, group.weight_versions))
        who = (str(group.position), Text(group.prompt_id), str(group.epoch), str(group.staleness))
        table.add_row(*who, group.fate, rewards, lengths, versions)
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
