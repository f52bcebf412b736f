"""attempts.jsonl: the ledger of attempts, the record of what was started, when it ended and why.

An attempt is one start of one step. Its number is claimed by creating its log directory, which one process
can do once; the ledger then gets one line when it starts and one when it ends. An attempt without an end
line whose process is gone was killed; in a Slurm job the next attempt finds out how, and writes the line for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from miles.runs.files import append_json, disk_errors, read_json_lines
from miles.runs.identity import node_name
from miles.runs.paths import RunPaths


class EndReason(StrEnum):
    """Why an attempt ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """Asked to, by a signal."""
    ENGINE_START = "engine-start"
    """An engine did not come up."""
    ENGINE_CRASH = "engine-crash"
    """An engine died while the step ran."""
    TRAINER_CRASH = "trainer-crash"
    """A rank of the step died."""
    TIME_LIMIT = "time-limit"
    """Ended itself because its time was nearly over."""
    FAILED = "failed"
    """The step ended with an error that it explained itself, or could not be started."""
    PREEMPTED = "preempted"
    """The cluster took its nodes for another job."""
    NODE_FAILURE = "node-failure"
    """A node of its died, or was cut off."""
    OUT_OF_MEMORY = "out-of-memory"
    """The system killed it for the memory that it took."""
    CANCELLED = "cancelled"
    """Somebody cancelled its job."""
    REQUEUED = "requeued"
    """Somebody put its job back into the queue."""
    KILLED = "killed"
    """It left no word, and neither did the cluster."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an attempt runs in a Slurm job, and what the step had on disk when it began."""

    job: int
    restart: int
    """How often the job had been put back into the queue."""
    nodes: Sequence[str]
    """Names of the nodes, the head first."""
    ranks: int
    """Trainer ranks of all nodes together: the world size."""
    output: int
    """Bytes that the output file of the job had: what Slurm said since then is about this attempt."""
    progress: Sequence[int]
    """What was on disk: training steps, and bytes of the journal after them. It grows, or there was no progress."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of one step."""

    number: int
    step: str
    host: str
    started: float
    """Unix time, in seconds."""
    note: str = ""
    """What a person should know about the start."""
    ended: float | None = None
    """None: still running, or killed."""
    reason: EndReason | None = None
    detail: str = ""
    """What a person should know about the end: the error's message."""
    exit_code: int | None = None
    """Exit code of the process that ran the step, as documented in docs/cli.md."""
    place: Place | None = None
    """None: not in a Slurm job."""


def begin_attempt(paths: RunPaths, step: str, *, note: str = "", place: Place | None = None) -> int:
    """Claim the next attempt number, make its log directory, write the start line; returns the number."""
    with disk_errors(paths.all_logs):
        paths.all_logs.mkdir(exist_ok=True)
        number = 1 + max((int(path.name[8:]) for path in paths.all_logs.glob("attempt-*")), default=0)
        while True:
            try:
                paths.logs(number).mkdir()
                break
            except FileExistsError:
                number += 1
        link = paths.all_logs / f".latest-{number}"
        link.unlink(missing_ok=True)
        link.symlink_to(paths.logs(number).name)
        link.replace(paths.latest_logs)
    start = {"event": "start", "attempt": number, "step": step, "time": time.time(), "note": note}
    where = {} if place is None else {"place": asdict(place)}
    append_json(paths.attempts, start | {"host": node_name(), "pid": os.getpid()} | where)
    return number


def end_attempt(
    paths: RunPaths,
    number: int,
    reason: EndReason,
    *,
    exit_code: int | None = 0,
    detail: str = "",
    ended: float | None = None,
) -> None:
    """Write the end line of an attempt. `ended`: Unix time, for one that was killed earlier; then nobody knows its exit
    code."""
    if ended is not None:
        exit_code = None
    end = {"event": "end", "attempt": number, "time": ended or time.time(), "reason": reason.value}
    append_json(paths.attempts, end | {"exit_code": exit_code, "detail": detail})


def read_attempts(paths: RunPaths) -> list[Attempt]:
    """All attempts by number."""
    attempts: dict[int, Attempt] = {}
    for record in read_json_lines(paths.attempts):
        number = record["attempt"]
        if record["event"] == "start":
            place = Place(**record["place"]) if "place" in record else None
            attempts[number] = Attempt(
                number, record["step"], record["host"], record["time"], record["note"], place=place
            )
        else:
            attempts[number] = replace(
                attempts[number],
                ended=record["time"],
                reason=EndReason(record["reason"]),
                detail=record["detail"],
                exit_code=record["exit_code"],
            )
    return [attempts[number] for number in sorted(attempts)]
