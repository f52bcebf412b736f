"""`miles explain` and `miles preempt`: why a run is where it is, and what would happen if it were preempted."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from miles.cli.common import (
    JsonOption,
    RunArgument,
    cluster_views,
    print_json,
    print_next,
    run_argument,
    stdout,
)


def explain(run: RunArgument = None, json: JsonOption = False) -> None:
    """Say why a run ended, waits or goes on, by what evidence, and what to do."""
    from dataclasses import asdict

    from miles.cluster.slurm.history import with_history
    from miles.reports.explain import explain_run
    from miles.runs.directory import find_run
    from miles.workflow.status import read_status

    paths = find_run(run)
    status = read_status(paths, with_history(cluster_views(paths)()))
    explanation = explain_run(paths, status, run=run_argument(paths.root))
    if json:
        print_json({"state": status.state.value, **asdict(explanation)})
        return
    console = stdout()
    console.print(f"{status.name}: {explanation.cause}", markup=False, soft_wrap=True)
    for line in explanation.evidence:
        console.print(f"  {line}", markup=False, soft_wrap=True, style="dim")
    if status.cluster.problem:
        console.print(f"Slurm could not be asked: {status.cluster.problem}", markup=False, style="yellow")
    print_next(console, *explanation.remedies)


def preempt(
    run: RunArgument = None,
    kind: Annotated[
        Literal["term", "usr1", "kill", "node"],
        typer.Option("--kind", help="SIGTERM, SIGUSR1 to the batch script, SIGKILL, or a node declared down."),
    ] = "term",
    grace: Annotated[
        float, typer.Option("--grace", min=0.0, help="Seconds between the signal and the end (term, usr1).")
    ] = 30.0,
) -> None:
    """Rehearse a preemption: do to a run's running job what Slurm would do.

    The run goes on in its next job, as after a real one. `--kind node` needs an administrator's rights.
    """
    from miles.cluster.slurm.commands import Slurm
    from miles.cluster.slurm.rehearse import Preemption, preempt_run
    from miles.runs.directory import find_run

    paths = find_run(run)
    console = stdout()
    job = preempt_run(paths, Slurm(), Preemption(kind), grace=grace, say=lambda text: console.print(text, markup=False))
    console.print(f"job {job.name} is {job.state.value} now, restarted {job.restarts} x")
    name = run_argument(paths.root)
    print_next(console, (f"miles watch {name}", "follow it"), (f"miles explain {name}", "what happened, and why"))
