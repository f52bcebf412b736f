"""Where everything of a run lies. Owns names only: reads and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STEP_PREFIX = "step:"


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of one run directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved run file."""
        return self.root / "run.toml"

    @property
    def config_changes(self) -> Path:
        """What was changed in the resolved run file since the run was made, JSON lines."""
        return self.root / "config-changes.jsonl"

    @property
    def forked(self) -> Path:
        """Which run and checkpoint this run began from, where it began from one."""
        return self.root / "forked.json"

    @property
    def attempts(self) -> Path:
        """The ledger of attempts, JSON lines."""
        return self.root / "attempts.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON line per training step of every stage."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """What the running step is doing right now."""
        return self.root / "progress.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.root / "report" / "report.html"

    @property
    def samples(self) -> Path:
        """Directory of transcripts, one directory per stage."""
        return self.root / "samples"

    @property
    def steps(self) -> Path:
        """Directory of the steps' outputs."""
        return self.root / "steps"

    def checkpoints(self, stage: str) -> Path:
        """Directory of a stage's checkpoints."""
        return self.root / "checkpoints" / stage

    def journal(self, stage: str) -> Path:
        """Directory of a stage's rollout journal."""
        return self.root / "journal" / stage

    @property
    def discarded(self) -> Path:
        """What was taken back (`miles.runs.rewind`), one directory each time; nothing deletes it."""
        return self.root / "discarded"

    @property
    def jobs(self) -> Path:
        """The ledger of submitted Slurm jobs, JSON lines."""
        return self.root / "jobs.jsonl"

    @property
    def scripts(self) -> Path:
        """Directory of the batch scripts, exactly as they were submitted."""
        return self.root / "sbatch"

    def script(self, step: str) -> Path:
        """The batch script of a step's newest job."""
        return self.scripts / f"{step}.sbatch"

    @property
    def stop_request(self) -> Path:
        """Exists while somebody wants the run to stop for good, not to go on in another job."""
        return self.root / "stop.json"

    def allocation(self, job: int, restart: int) -> Path:
        """What the head of a Slurm allocation tells its other nodes."""
        return self.root / "allocations" / f"{job}-{restart}.json"

    def nodes(self, attempt: int) -> Path:
        """Directory in which the nodes of an attempt report to its head."""
        return self.logs(attempt) / "nodes"

    def slurm_log(self, step: str, job: int | str) -> Path:
        """Output of a job's batch script, and what Slurm itself says about it. `%j` stands for any job's id."""
        return self.all_logs / f"slurm-{step}-{job}.out"

    @property
    def save_request(self) -> Path:
        """Exists while somebody waits for a checkpoint (`miles save`)."""
        return self.root / "save-request"

    def engines(self, attempt: int) -> Path:
        """Where the engines of an attempt are (`miles.runs.endpoints`)."""
        return self.logs(attempt) / "engines.json"

    @property
    def secrets(self) -> Path:
        """Directory (0700) of the run's secrets."""
        return self.root / "secrets"

    @property
    def engine_token(self) -> Path:
        """File (0600) with the bearer token of the run's engines."""
        return self.secrets / "engine-token"

    @property
    def claims(self) -> Path:
        """Directory of the files that say which process drives the run."""
        return self.root / "claims"

    @property
    def all_logs(self) -> Path:
        """Directory of the attempts' log directories."""
        return self.root / "logs"

    @property
    def latest_logs(self) -> Path:
        """Symbolic link to the newest attempt's log directory."""
        return self.all_logs / "latest"

    @property
    def driver_log(self) -> Path:
        """Log of the process that runs the workflow locally."""
        return self.all_logs / "local.log"

    @property
    def driver_failure(self) -> Path:
        """Why that process failed (`miles.runs.failures`)."""
        return self.all_logs / "local.failure.json"

    def logs(self, attempt: int) -> Path:
        """Log directory of an attempt, counted from 1."""
        return self.all_logs / f"attempt-{attempt:03d}"

    def step(self, name: str) -> Path:
        """Output directory of a step."""
        return self.steps / name

    def done(self, name: str) -> Path:
        """The file that says that a step is done, and with which inputs."""
        return self.step(name) / "done.json"

    def inputs(self, name: str) -> Path:
        """The file that says with which inputs a step's checkpoints and journal were made."""
        return self.step(name) / "inputs.json"

    def resolve(self, reference: str) -> Path:
        """`step:NAME/file` -> the file in that step's output directory; any other path unchanged."""
        if not reference.startswith(STEP_PREFIX):
            return Path(reference)
        name, _, file = reference.removeprefix(STEP_PREFIX).partition("/")
        return self.step(name) / file
