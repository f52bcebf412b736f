"""jobs.jsonl: the ledger of submitted jobs. Slurm forgets a job minutes after its end; this does not.

Owns one line per submission. What became of a job is Slurm's to say while it knows (`miles.cluster.slurm.queue`), and
the attempts' ledger afterwards.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from miles.cluster.slurm.ids import Element, JobId
from miles.runs.files import append_json, read_json_lines
from miles.runs.paths import RunPaths


class JobKind(StrEnum):
    """Why a job was submitted."""

    FIRST = "first"
    """By the command that submitted the step for the first time."""
    CHAIN = "chain"
    """As a successor, which finds nothing to do when the job before it finished the step."""
    RESUME = "resume"
    """By a later command, because the jobs before it had ended."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One submission."""

    step: str
    job: int
    """Number of the job, or of the array."""
    kind: JobKind
    script: str
    """Path of the batch script."""
    time: float
    """Unix time of the submission, in seconds."""
    dependency: str | None
    """As `sbatch --dependency` got it."""
    element: int | None = None
    """Which element of the array is this run's; None: the job is no array."""

    @property
    def id(self) -> JobId:
        """What Slurm's commands call the job: `12`, or `53_3`."""
        return self.job if self.element is None else Element(self.job, self.element)


def append_job(paths: RunPaths, record: JobRecord) -> None:
    """Write the line of a job that Slurm has accepted."""
    append_json(paths.jobs, asdict(record))


def read_jobs(paths: RunPaths) -> list[JobRecord]:
    """All submissions, oldest first."""
    return [JobRecord(**record | {"kind": JobKind(record["kind"])}) for record in read_json_lines(paths.jobs)]
