"""An attempt in a Slurm job, as its head needs it: how long it may run, its budget, and its place in the ledger."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from miles.cluster.allocation import Allocation
from miles.cluster.budget import attempts_since_submit, check_budget, progress_of
from miles.cluster.endings import read_output, slurm_word, why_signalled
from miles.cluster.network import Network
from miles.cluster.peers import Timing
from miles.config.cluster import SlurmSection
from miles.config.schema import LocalSection
from miles.runs.attempts import Attempt, EndReason, Place, end_attempt, read_attempts
from miles.runs.paths import RunPaths
from miles.workflow.kinds import Processes

RANK_GRACE_SECONDS = 120.0
"""How long ranks may take to save everything and end after they were asked to stop, where nobody else says."""


@dataclass(frozen=True, slots=True)
class InJob:
    """The Slurm job in which an attempt runs."""

    allocation: Allocation
    slurm: SlurmSection
    network: Network
    code: str
    timing: Timing = field(default_factory=Timing)

    def launch_file(self, paths: RunPaths) -> Path:
        """Where the head tells the other nodes what to start."""
        return paths.allocation(self.allocation.job, self.allocation.restart)

    def check_budget(self, paths: RunPaths, step: str) -> None:
        """Raise RunError when the next attempt of a step would be one too many."""
        attempts = attempts_since_submit(paths, step, read_attempts(paths))
        limits = self.slurm
        check_budget(
            step,
            attempts,
            progress_of(paths, step),
            max_attempts=limits.max_attempts,
            max_idle=limits.max_idle_attempts,
            run=paths.root.name,
        )

    def place(self, paths: RunPaths, step: str, processes: Processes) -> Place:
        """Where an attempt of a step would run now."""
        output = paths.slurm_log(step, self.allocation.job)
        return Place(
            job=self.allocation.job,
            restart=self.allocation.restart,
            nodes=self.allocation.nodes,
            ranks=processes.share(0, len(self.allocation.nodes)).world,
            output=output.stat().st_size if output.exists() else 0,
            progress=progress_of(paths, step),
        )

    def size_note(self, paths: RunPaths, step: str, place: Place) -> str:
        """What to say when the number of ranks is another than in the attempt before; empty: it is the same."""
        before = [attempt.place for attempt in read_attempts(paths) if attempt.step == step and attempt.place]
        if not before or before[-1].ranks == place.ranks:
            return ""
        ranks, nodes = ("1 rank" if n == 1 else f"{n} ranks" for n in (place.ranks, before[-1].ranks))
        where = "1 node" if len(place.nodes) == 1 else f"{len(place.nodes)} nodes"
        return f"now with {ranks} on {where}, before with {nodes} on {len(before[-1].nodes)}"

    def true_reason(self, paths: RunPaths, step: str, place: Place, reason: EndReason) -> EndReason:
        """The ledger's word for an end, with what Slurm has said since the attempt began.

        A signal looks like a preemption whoever caused it, and a rank whose node dies, or that the system kills for its
        memory, like one that crashed.
        """
        said = slurm_word(read_output(paths.slurm_log(step, place.job), place.output))
        if said is None:
            return reason
        if reason in (EndReason.PREEMPTED, EndReason.TIME_LIMIT):
            return said
        if reason in (EndReason.TRAINER_CRASH, EndReason.ENGINE_CRASH, EndReason.ENGINE_START):
            return said if said in (EndReason.NODE_FAILURE, EndReason.OUT_OF_MEMORY) else reason
        return reason


@dataclass(frozen=True, slots=True)
class Terms:
    """How long an attempt may run, and what a signal means to it."""

    deadline: float | None
    """Unix time at which it must have ended; None: no time is known."""
    limit: str
    """What the deadline is, in words."""
    grace: float
    """Seconds from a signal to the kill."""
    lead: float = 0.0
    """Seconds before its end at which a job is told of it."""
    in_job: bool = False

    @classmethod
    def of(cls, local: LocalSection, job: InJob | None) -> Terms:
        """As the config and the job say."""
        minutes = local.time_limit_minutes
        deadline = None if minutes is None else time.time() + 60 * minutes
        limit = "" if minutes is None else f"its time limit of {minutes:g} minutes"
        if job is None:
            return cls(deadline, limit, RANK_GRACE_SECONDS)
        end, section = job.allocation.end, job.slurm
        if end is not None and (deadline is None or end < deadline):
            deadline, limit = end, f"the time limit of job {job.allocation.job}"
        grace = job.allocation.grace if section.grace_seconds is None else section.grace_seconds
        return cls(deadline, limit, grace, 60 * section.save_lead_minutes, in_job=True)

    @property
    def seconds_left(self) -> float:
        """Until the deadline; none where there is none."""
        return 0.0 if self.deadline is None else self.deadline - time.time()

    def why(self, paths: RunPaths, *, warned: bool) -> EndReason | None:
        """Why a signal came now (`warned`: as `StopSignal` says); None: somebody sent it who is not Slurm."""
        if not self.in_job:
            return None
        requested = paths.stop_request.exists()
        now = time.time()
        return why_signalled(stop_requested=requested, warned=warned, end=self.deadline, now=now, lead=self.lead)


def close_killed(paths: RunPaths) -> None:
    """Write the end lines of attempts in jobs that could not do it themselves. Call it with the run claimed."""
    attempts = read_attempts(paths)
    for attempt in attempts:
        if attempt.ended is None and attempt.place is not None:
            reason = killed_reason(paths, attempt, attempts)
            detail = f"killed; the output of job {attempt.place.job} tells why"
            if reason is EndReason.KILLED:
                detail = "killed, nobody says by whom"
            end_attempt(paths, attempt.number, reason, detail=detail, ended=_last_sign(paths, attempt))


def killed_reason(paths: RunPaths, attempt: Attempt, attempts: list[Attempt]) -> EndReason:
    """Why an attempt in a job ended that wrote no end, from what Slurm said between its begin and the next one's."""
    place = attempt.place
    assert place is not None
    later = (other.place.output for other in attempts if other.place and other.place.job == place.job)
    end = min((output for output in later if output > place.output), default=None)
    return slurm_word(read_output(paths.slurm_log(attempt.step, place.job), place.output, end)) or EndReason.KILLED


def _last_sign(paths: RunPaths, attempt: Attempt) -> float:
    """When an attempt last wrote anything into its log directory."""
    times = [file.stat().st_mtime for file in paths.logs(attempt.number).rglob("*") if file.is_file()]
    return max([attempt.started, *times], default=math.nan)
