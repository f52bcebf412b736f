"""Why a run is where it is: cause, evidence and remedy, from the ledger, the cluster's word and the ends of the logs.

Pure, but for `evidence_of`, which reads the ends of logs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from miles.runs.attempts import Attempt, EndReason, read_attempts
from miles.runs.paths import RunPaths
from miles.workflow.status import JobStatus, RunStatus, State, StepStatus

_TAIL_BYTES = 16384
_EVIDENCE_LINES = 6
_TELLING = re.compile(r"error|DUE TO|oom|killed|Traceback|Exception|refused|No space|CANCELLED", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a run, or its last attempt, ended, or why it does not end or begin."""

    cause: str
    evidence: list[str]
    """Lines that say so, each with where it comes from."""
    remedies: list[tuple[str, str]]
    """Commands with what they do, the best first."""


REMEDIES = {
    EndReason.PREEMPTED: "nothing is lost but what was being computed; it goes on in the next job",
    EndReason.TIME_LIMIT: "it ended itself with everything saved; a longer slurm.time means fewer restarts",
    EndReason.REQUEUED: "nothing is lost but what was being computed; it goes on when the job begins again",
    EndReason.NODE_FAILURE: "the next job gets other nodes; where one node fails again, exclude it: "
    '`slurm.extra = { exclude = "NODE" }`',
    EndReason.OUT_OF_MEMORY: "give it more (slurm.memory_per_node), or need less: train.micro_batch_tokens, "
    "rollout.prompts_per_step",
    EndReason.CANCELLED: "somebody cancelled the job (scancel); nothing on disk is lost",
    EndReason.KILLED: "no record says why; `miles logs --role job` shows what its job said last",
    EndReason.ENGINE_START: "`miles logs --role engine` shows why the engine did not come up",
    EndReason.ENGINE_CRASH: "`miles logs --role engine` shows how the engine ended",
    EndReason.TRAINER_CRASH: "`miles logs --role trainer` shows how the rank ended",
    EndReason.STOPPED: "it was asked to stop and has saved everything",
    EndReason.FAILED: "the message says what must change",
    EndReason.FINISHED: "",
}
"""What to know, and to do, about each reason."""

WAITS = {
    "Priority": "other jobs come first",
    "Resources": "it is the next one, when enough nodes are free",
    "Dependency": "the job before it has not ended",
    "DependencyNeverSatisfied": "a job that it needs has failed: it will never run",
    "JobArrayTaskLimit": "as many runs of its sweep run as may (--at-once)",
    "BeginTime": "Slurm waits a little before it starts a job again",
    "JobHeldUser": "somebody holds it: `scontrol release JOB`",
    "JobHeldAdmin": "an administrator holds it",
    "PartitionNodeLimit": "the partition has no such number of nodes (slurm.nodes)",
    "PartitionTimeLimit": "the partition allows less time (slurm.time)",
    "PartitionDown": "the partition is down",
    "ReqNodeNotAvail": "nodes that it asks for are down or reserved",
    "QOSMaxJobsPerUserLimit": "you have as many jobs as your quality of service allows",
    "AssocGrpCPUMinutesLimit": "the account's time is used up",
    "AssocMaxJobsLimit": "you have as many jobs as your account allows",
}
"""Slurm's reasons for which a job waits, for people."""


def explain(status: RunStatus, attempts: list[Attempt], evidence: list[str], *, run: str) -> Explanation:
    """Why the run is where it is. `run`: how commands name it."""
    logs, resume = (f"miles logs {run}", "what its processes said"), (f"miles resume {run}", "continue it")
    match status.state:
        case State.DONE:
            return Explanation("it is done: every step has finished", [], [(f"miles report {run}", "the report")])
        case State.RUNNING:
            running = next((step for step in status.steps if step.state is State.RUNNING), None)
            where = f"step '{running.name}', attempt {running.attempts}" if running else "between two steps"
            history = [line for line in map(_ended, _interrupted(attempts)) if line]
            return Explanation(f"it runs: {where}", history, [(f"miles watch {run}", "follow it")])
        case State.QUEUED:
            return Explanation(
                _why_waiting(status),
                [line for line in map(_ended, _interrupted(attempts)) if line],
                [(f"miles watch {run}", "follow it"), (f"miles stop {run}", "take it back")],
            )
    ended = status.failed_step
    if ended is None:
        never = "it has not begun, and nothing drives it"
        jobs = [_job_line(job) for job in status.cluster.jobs[-3:]]
        return Explanation(never, [*jobs, *evidence], [resume, logs])
    last = [attempt for attempt in attempts if attempt.step == ended.name][-1:]
    jobs = [_job_line(job) for job in status.cluster.jobs if job.step == ended.name][-2:]
    return Explanation(_why_ended(ended), [*map(_ended, last), *jobs, *evidence], [resume, logs])


def evidence_of(paths: RunPaths, status: RunStatus) -> list[str]:
    """The telling lines at the ends of the last job's output and of the newest attempt's logs, with their files."""
    files = sorted(paths.all_logs.glob("slurm-*.out"), key=lambda file: file.stat().st_mtime)[-1:]
    if status.failed_step is not None:
        files += sorted(paths.latest_logs.resolve().glob("*.log"))
    return [f"{file.name}: {line}" for file in files for line in _telling_lines(file)]


def explain_run(paths: RunPaths, status: RunStatus, *, run: str) -> Explanation:
    """Why the run is where it is, with what its files say."""
    return explain(status, read_attempts(paths), evidence_of(paths, status), run=run)


def _why_ended(step: StepStatus) -> str:
    what = {State.STOPPED: "was interrupted", State.KILLED: "was killed"}.get(step.state, "failed")
    reason = step.reason or EndReason.KILLED
    advice = REMEDIES[reason]
    detail = f"\n{step.detail}" if step.detail else ""
    return f"step '{step.name}' {what}: {reason.value}{detail}" + (f"\n{advice}" if advice else "")


def _why_waiting(status: RunStatus) -> str:
    waiting = [job for job in status.cluster.live if job.waiting]
    if not waiting:
        return "its job has begun and has not taken up the work yet"
    job = waiting[0]
    meaning = WAITS.get(job.reason.partition(",")[0].strip("()"), "")
    again = f" It was interrupted {job.restarts} x before." if job.restarts else ""
    told = f"{job.reason}{f': {meaning}' if meaning else ''}" if job.reason else "Slurm gives no reason"
    return f"job {job.name} of step '{job.step}' waits ({told}).{again}"


def _interrupted(attempts: list[Attempt]) -> Iterator[Attempt]:
    return (attempt for attempt in attempts if attempt.reason not in (None, EndReason.FINISHED))


def _ended(attempt: Attempt) -> str:
    """`attempt 3 of grpo: preempted, at 2026-01-02 03:04:05 after 61 s`; empty for one that has no end."""
    if attempt.ended is None or attempt.reason is None:
        return f"attempt {attempt.number} of {attempt.step}: its end is on no record"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.ended))
    seconds = attempt.ended - attempt.started
    return f"attempt {attempt.number} of {attempt.step}: {attempt.reason.value}, at {when} after {seconds:.0f} s"


def _job_line(job: JobStatus) -> str:
    if job.runs:
        return f"job {job.name} of {job.step}: {', then '.join(job.runs)} (by Slurm's accounting)"
    state = job.state or "not known to Slurm any more"
    return f"job {job.name} of {job.step}: {state}{f', restarted {job.restarts} x' if job.restarts else ''}"


def _telling_lines(file: Path) -> list[str]:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    telling = [line.strip() for line in lines if _TELLING.search(line)]
    return telling[-_EVIDENCE_LINES:]
