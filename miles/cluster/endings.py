"""Why an attempt ended: the ledger's word for an error, for a signal, and for what Slurm wrote into the job's output.

Pure, and the only place where that is decided. Works without accounting, which many clusters do not have.
"""

from __future__ import annotations

import re
from pathlib import Path

from miles.errors import EngineError, EngineLost, Interrupted, MilesError, RankLost, TrainerError
from miles.runs.attempts import EndReason
from miles.runs.paths import RunPaths

TICK_SECONDS = 90.0
"""How much too early Slurm's signal before the time limit may come, and what its clocks round away."""
CLOCK_SECONDS = 5.0
"""How far Slurm's clock and the time left, which it tells in seconds, may be off."""

_SLURM = re.compile(r"^((slurmstepd|srun|slurmd)(-\S+)?: |\[[-\d]+T[\d:.]+\] )")
"""Before 26.05 a line of slurmstepd begins with its name, since then with the time in brackets."""
_WORDS = (
    (EndReason.NODE_FAILURE, re.compile(r"DUE TO NODE FAILURE|Node failure on ", re.IGNORECASE)),
    (EndReason.OUT_OF_MEMORY, re.compile(r"oom[-_ ]?kill|out of memory", re.IGNORECASE)),
    (EndReason.PREEMPTED, re.compile(r"DUE TO PREEMPTION")),
    (EndReason.TIME_LIMIT, re.compile(r"DUE TO TIME LIMIT")),
    (EndReason.REQUEUED, re.compile(r"DUE TO JOB REQUEUE")),
    (EndReason.CANCELLED, re.compile(r"\*\*\* JOB \d+ .*CANCELLED AT \S+( DUE to SIGNAL Terminated)?( \*\*\*)?\s*$")),
)
"""What Slurm 22.05 to 26.05 says, the most telling first: the end of a job cancels its steps, whatever it came from. A
step alone is cancelled, in the same words, by the first signal of a preemption."""


_NO_MEMORY = re.compile(
    r"out ?of ?memory|\bMemoryError\b|bad_alloc|(?:can't|cannot) allocate memory|memory allocation of"
    r"|failed to map segment",
    re.IGNORECASE,
)
"""What Python, torch, CUDA, C++, Rust and the C library say about it in the last lines of a process."""


class EndedEarly(Interrupted):
    """The attempt ended for a reason that is no fault of the run's; it goes on in another."""

    def __init__(self, message: str, reason: EndReason, *, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.reason = reason


def end_reason(error: MilesError, *, engines_came_up: bool) -> EndReason:
    """The ledger's word for an error that ended a step."""
    match error:
        case EndedEarly():
            return error.reason
        case RankLost() | EngineLost() if _NO_MEMORY.search(error.message):
            return EndReason.OUT_OF_MEMORY
        case Interrupted():
            return EndReason.STOPPED
        case EngineError():
            return EndReason.ENGINE_CRASH if engines_came_up else EndReason.ENGINE_START
        case TrainerError():
            return EndReason.TRAINER_CRASH
        case _:
            return EndReason.FAILED


def may_pass(error: MilesError, reason: EndReason) -> bool:
    """Whether the next attempt may get further although nothing is changed: with other nodes, or by chance.

    A process that says what is wrong will say it again; so will an engine that has never come up.
    """
    if reason is EndReason.NODE_FAILURE:
        return True
    return isinstance(error, RankLost | EngineLost) and reason is not EndReason.ENGINE_START


def why_signalled(*, stop_requested: bool, warned: bool, end: float | None, now: float, lead: float) -> EndReason:
    """Why a job was asked to end at `now`, `lead` seconds being when Slurm says that its time is nearly over.

    Slurm warns the batch script of the time limit, and a preemption says nothing else than its signal;
    `warned`: it was such a warning. `end` is the Unix time of the job's time limit.
    """
    if stop_requested:
        return EndReason.STOPPED
    if end is not None and end - now < (lead + TICK_SECONDS if warned else CLOCK_SECONDS):
        return EndReason.TIME_LIMIT
    return EndReason.PREEMPTED


def slurm_word(output: str) -> EndReason | None:
    """What Slurm says about the end of a job in its output file; None: nothing."""
    lines = [line for line in output.splitlines() if _SLURM.match(line)]
    for reason, pattern in _WORDS:
        if any(pattern.search(line) for line in lines):
            return reason
    return None


def read_output(file: Path, begin: int = 0, end: int | None = None) -> str:
    """A part of a job's output, in bytes; empty when there is no such file."""
    try:
        with file.open("rb") as stream:
            stream.seek(begin)
            return stream.read(-1 if end is None else max(0, end - begin)).decode(errors="replace")
    except FileNotFoundError:
        return ""


def interrupted(what: str, paths: RunPaths) -> Interrupted:
    """The error of a run that was asked to stop, with the command that continues it."""
    return Interrupted(what, fix=continues(paths))


def continues(paths: RunPaths) -> str:
    """The command that continues a run, in a sentence."""
    return f"`miles resume {paths.root}` continues the run"
