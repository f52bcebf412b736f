"""How often a step may begin again without a person, and what counts as progress."""

from __future__ import annotations

from collections.abc import Sequence

from miles.errors import RunError
from miles.runs.attempts import Attempt, EndReason
from miles.runs.files import read_json_lines
from miles.runs.paths import RunPaths
from miles.workflow.stage import read_state

NO_FAULT = frozenset(
    (EndReason.PREEMPTED, EndReason.NODE_FAILURE, EndReason.REQUEUED, EndReason.CANCELLED, EndReason.STOPPED)
)
"""Ends that say nothing about the run: a busy cluster may preempt it many times before it has its first token."""


def progress_of(paths: RunPaths, stage: str) -> tuple[int, int]:
    """What a stage has on disk: training steps that need not be generated again, and bytes of the journal beyond."""
    step = read_state(paths, stage).step
    segments = (
        file for file in paths.journal(stage).glob("step-[0-9]*/segment-*.h5") if int(file.parent.name[5:]) > step
    )
    return step, sum(file.stat().st_size for file in segments)


def attempts_since_submit(paths: RunPaths, step: str, attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts of a step in jobs since a person last submitted it."""
    submitted = max((record["time"] for record in read_json_lines(paths.jobs) if record["step"] == step), default=0.0)
    return [
        attempt
        for attempt in attempts
        if attempt.step == step and attempt.place is not None and attempt.started >= submitted
    ]


def idle_attempts(attempts: Sequence[Attempt], progress: Sequence[int]) -> list[Attempt]:
    """The last attempts, in a row, that left nothing on disk by their own fault; `progress`: what is there now."""
    idle: list[Attempt] = []
    after = tuple(progress)
    for attempt in reversed(attempts):
        if attempt.place is None or tuple(attempt.place.progress) < after or attempt.reason is EndReason.FINISHED:
            break
        if attempt.reason not in NO_FAULT:
            idle.insert(0, attempt)
    return idle


def check_budget(
    step: str, attempts: Sequence[Attempt], progress: Sequence[int], *, max_attempts: int, max_idle: int, run: str
) -> None:
    """Raise RunError when the next attempt of a step would be one too many, with what ended those before it."""
    if len(attempts) >= max_attempts:
        raise RunError(
            f"step '{step}' had {len(attempts)} attempts (slurm.max_attempts = {max_attempts}); "
            f"the last ended: {_end(attempts[-1])}",
            fix=f"`miles explain {run}` tells more; `miles resume {run}` goes on",
        )
    idle = idle_attempts(attempts, progress)
    if len(idle) >= max_idle:
        ends = "; ".join(f"attempt {attempt.number}: {_end(attempt)}" for attempt in idle[-max_idle:])
        raise RunError(
            f"the last {len(idle)} attempts of step '{step}' made no progress, not one training step or token "
            f"(slurm.max_idle_attempts = {max_idle}): {ends}",
            fix=f"`miles explain {run}` tells more; `miles resume {run}` tries again once the cause is gone",
        )


def _end(attempt: Attempt) -> str:
    reason = EndReason.KILLED if attempt.reason is None else attempt.reason
    return f"{reason}, {attempt.detail.splitlines()[0]}" if attempt.detail else str(reason)
