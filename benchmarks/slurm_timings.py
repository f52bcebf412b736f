"""What an interruption on a cluster costs: seconds until the job waits again, until it draws tokens again, and tokens.

Owns the measurement of one interruption of a running job; `slurm_proofs.py --scenario timings` makes the table.

Tokens drawn are the engines' own count, asked just before the interruption (of a time limit, until they are gone), and
compared with the tokens on disk when the job runs again. What is drawn in between is not counted as lost.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from resume_cost import tokens_evaluated, tokens_of_engines, tokens_on_disk

from miles.runs.attempts import Attempt
from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths
from tests.chaos.run import STAGE
from tests.slurm.torment import new_steps, stage_attempts
from tests.slurm.user import User

POLL_SECONDS = 0.1


class Kind(StrEnum):
    """How a job is interrupted. All are real, but `kill`: SIGKILL to all its processes, and then a requeue."""

    TERM = "term"
    """A job of a higher partition; SIGTERM to the processes."""
    USR1 = "usr1"
    """The same where the site has preempt_send_user_signal: SIGUSR1 to the batch script."""
    KILL = "kill"
    NODE = "node"
    """One of its nodes is declared down."""
    REQUEUE = "requeue"
    """`scontrol requeue`: SIGTERM, and SIGKILL after KillWait."""
    LIMIT = "time-limit"


PREEMPTIONS = (Kind.TERM, Kind.USR1)


@dataclass(frozen=True, slots=True)
class Interruption:
    """One interruption. Times in seconds."""

    kind: Kind
    step: int
    """The last that was done before."""
    reason: str | None
    """The ledger's word for the end of the attempt."""
    note: str
    """How the next attempt went on."""
    term_to_requeue_seconds: float | None
    """From the first signal of it (of a preemption: Slurm's PreemptTime) until Slurm has put the job back."""
    requeue_to_start_seconds: float
    """For which Slurm held it back and looked for nodes."""
    start_to_attempt_seconds: float
    """From the job's start, as Slurm says it, to the new attempt in the ledger."""
    start_to_first_token_seconds: float
    start_to_first_step_seconds: float
    tokens_lost: int
    """Drawn, not on disk, and to be drawn again."""


def interrupt(user: User, name: str, kind: Kind, *, on_disk: int, dice: random.Random) -> tuple[Interruption, int]:
    """Interrupt a running job once, in a step after its attempt's first new one, and see it come back.

    `on_disk`: tokens that were there when the attempt began. Returns the record, and the tokens on disk afterwards.
    """
    paths, job, bed = user.run(name), user.job(name), user.bed
    attempt = _running_attempt(user, name)
    _wait(lambda: new_steps(paths, attempt) >= 2, 0.1)
    time.sleep(dice.uniform(0.0, 2.0))
    restarts = int(bed.show(job)["Restarts"])
    drawn = tokens_drawn(paths, attempt)
    step = max(line.step for line in read_metrics(paths) if line.stage == STAGE)
    asked = _interrupt(user, job, kind, restarts)
    while not _restarted(user, job, restarts):
        if kind is Kind.LIMIT:
            drawn = tokens_drawn(paths, attempt, drawn)
        time.sleep(POLL_SECONDS)
    requeued = time.time()
    _wait(lambda: bed.show(job)["JobState"] == "RUNNING", POLL_SECONDS)
    running = time.time()
    kept = tokens_on_disk(paths)
    following = _running_attempt(user, name, after=attempt.number)
    token = _first_token(paths, following)
    _wait(lambda: new_steps(paths, following) > 0, 0.1)
    first_step = min(line.time for line in read_metrics(paths) if line.stage == STAGE and line.time > following.started)
    ended = next(other for other in stage_attempts(paths) if other.number == attempt.number)
    record = Interruption(
        kind=kind,
        step=step,
        reason=ended.reason,
        note=following.note,
        term_to_requeue_seconds=None if asked is None else round(requeued - asked, 1),
        requeue_to_start_seconds=round(running - requeued, 1),
        start_to_attempt_seconds=round(following.started - running, 1),
        start_to_first_token_seconds=round(token - running, 1),
        start_to_first_step_seconds=round(first_step - running, 1),
        tokens_lost=max(0, on_disk + drawn - kept),
    )
    return record, kept


def _interrupt(user: User, job: int, kind: Kind, restarts: int) -> float | None:
    """Do it; when the job was told, None where nobody outside can see that."""
    bed = user.bed
    asked: float | None = time.time()
    match kind:
        case Kind.TERM | Kind.USR1:
            bed.preempt(job)
            # Without a grace time the job may be gone before Slurm has shown when it was preempted.
            _wait(lambda: _preempted(user, job) or _restarted(user, job, restarts), POLL_SECONDS)
            asked = time.time() if _preempted(user, job) else None
        case Kind.KILL:
            bed.run("scancel", "--signal=KILL", f"{job}.0")  # to the whole job it would cancel it
            _requeue(user, job, restarts)
        case Kind.NODE:
            bed.set_down(stage_nodes(user, job)[-1])
        case Kind.REQUEUE:
            _requeue(user, job, restarts)
        case Kind.LIMIT:
            asked = None
    return asked


def _preempted(user: User, job: int) -> bool:
    return user.bed.show(job).get("PreemptTime", "None") != "None"


def _restarted(user: User, job: int, restarts: int) -> bool:
    return int(user.bed.show(job)["Restarts"]) > restarts


def _requeue(user: User, job: int, restarts: int) -> None:
    """Put the job back into the queue, unless its own batch script was faster."""
    try:
        user.bed.run("scontrol", "requeue", job)
    except RuntimeError:
        if not _restarted(user, job, restarts):
            raise


def stage_nodes(user: User, job: int) -> list[str]:
    """Names of the nodes of a job."""
    return user.bed.run("scontrol", "show", "hostnames", user.bed.show(job)["NodeList"]).split()


def tokens_drawn(paths: RunPaths, attempt: Attempt, otherwise: int = 0) -> int:
    """Tokens that the engines of an attempt have drawn for training; `otherwise`: when they do not answer any more."""
    try:
        drawn = tokens_of_engines(paths, attempt.number)
    except OSError:
        return otherwise
    first = next(line for line in read_metrics(paths) if line.stage == STAGE)
    return drawn - (tokens_evaluated(paths) if first.time > attempt.started else 0)


def _running_attempt(user: User, name: str, after: int = 0) -> Attempt:
    paths = user.run(name)

    def there() -> bool:
        attempts = stage_attempts(paths)
        return bool(attempts) and attempts[-1].number > after and attempts[-1].ended is None

    _wait(there, POLL_SECONDS)
    return stage_attempts(paths)[-1]


def _first_token(paths: RunPaths, attempt: Attempt) -> float:
    """Unix time of the first file of the journal that an attempt wrote: at most the flush interval after its token."""
    found: list[float] = []

    def there() -> bool:
        for path in paths.journal(STAGE).glob("step-*/*.h5"):
            try:
                changed = path.stat().st_mtime
            except FileNotFoundError:
                continue
            if changed > attempt.started:
                found.append(changed)
        return bool(found)

    _wait(there, 0.05)
    return min(found)


def _wait(true: Callable[[], bool], poll: float) -> None:
    end = time.monotonic() + 300
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("the run does not go on")
        time.sleep(poll)


FIGURES = (
    "term_to_requeue_seconds",
    "requeue_to_start_seconds",
    "start_to_attempt_seconds",
    "start_to_first_token_seconds",
    "start_to_first_step_seconds",
    "tokens_lost",
)


def summary(interruptions: list[Interruption], tokens_per_step: int) -> dict[str, Any]:
    """Median, least and most of each figure, by kind."""
    table: dict[str, Any] = {}
    for kind in Kind:
        rows = [asdict(each) for each in interruptions if each.kind is kind]
        if rows:
            table[kind] = {"count": len(rows), "tokens_per_step": tokens_per_step}
            for figure in FIGURES:
                values = [row[figure] for row in rows if row[figure] is not None]
                table[kind][figure] = spread(values) if values else None
    return table


def spread(values: list[float]) -> dict[str, float]:
    """Median, least, most, count."""
    middle = round(statistics.median(values), 2)
    return {"median": middle, "least": min(values), "most": max(values), "count": len(values)}
