"""A user of a cluster of the testbed, who types commands in a directory, and what must be true of a run in the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from miles.cluster.slurm.jobs import read_jobs
from miles.runs.attempts import EndReason, read_attempts
from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths
from tests.chaos.audit import (
    NOT_COMPARED,
    checkpoint_findings,
    journal_findings,
    log_findings,
    metric_findings,
    process_findings,
    weight_findings,
)
from tests.chaos.run import STAGE, Case, last_step, python_path

from .testbed import Testbed

SECONDS = 300.0
"""For one state of a run to come."""


@dataclass(frozen=True)
class User:
    """Who types commands in a directory, on a cluster."""

    directory: Path
    bed: Testbed

    def miles(self, *arguments: str, code: int = 0) -> str:
        """Output of `miles ARGUMENTS`, which must end with this exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "miles", *arguments],
            cwd=self.directory,
            env=self.bed.environment | {"PYTHONPATH": python_path(), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"miles {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def write(self, case: Case) -> Path:
        """Write a run file whose run, `proof`, will be below the user's directory."""
        file = case.write(self.directory / "files")
        file.write_text(file.read_text().replace(str(file.parent / "runs"), str(self.directory / "runs")))
        return file

    def run(self, name: str = "proof") -> RunPaths:
        return RunPaths(self.directory / "runs" / name)

    def status(self, name: str = "proof") -> dict:
        return json.loads(self.miles("status", name, "--json"))

    def until(self, true: Callable[[], bool], what: str, name: str = "proof", seconds: float = SECONDS) -> None:
        """Wait until something is true, and not for ever."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise TimeoutError(f"{what}\n{self.miles('status', name)}\n{self.miles('logs', name, '--role', 'job')}")
            time.sleep(0.2)

    def until_state(self, state: str, name: str = "proof") -> None:
        self.until(lambda: self.status(name)["state"] == state, f"the run is not {state}", name)

    def until_step(self, step: int, name: str = "proof") -> None:
        self.until(lambda: last_step(self.run(name)) >= step, f"step {step} does not come", name)

    def reasons(self, name: str = "proof", stage: str = STAGE) -> list[EndReason | None]:
        """How the attempts of a stage ended."""
        return [attempt.reason for attempt in read_attempts(self.run(name)) if attempt.step == stage]

    def fork(self, name: str, *overrides: str) -> RunPaths:
        """A run whose stage is to begin from the warm start of the undisturbed one."""
        sets = [word for override in overrides for word in ("--set", override)]
        self.miles("fork", "proof", name, "--stage", STAGE, "--from", "start", *sets)
        return self.run(name)

    def job(self, name: str = "proof") -> int:
        """The newest job of a run."""
        return read_jobs(self.run(name))[-1].job

    def settled(self, paths: RunPaths) -> list[str]:
        """What is wrong with a run that has ended, or not as in the undisturbed one."""
        return [*differences(paths, self.run()), *unsound(paths)]


def differences(paths: RunPaths, reference: RunPaths) -> list[str]:
    """What is not as in the undisturbed run: weights, journal, metrics, to the last bit."""
    return [
        *weight_findings(paths, reference, (STAGE,)),
        *journal_findings(paths, reference),
        *metric_findings(paths, reference, (STAGE,)),
    ]


def unsound(paths: RunPaths) -> list[str]:
    """What is wrong with a run that has ended in itself: damaged checkpoints, live processes, stacks in logs."""
    return [*checkpoint_findings(paths, (STAGE,)), *process_findings(paths), *log_findings(paths)]


def curve_distance(paths: RunPaths, reference: RunPaths) -> dict[str, float]:
    """How far a run on other numbers of ranks is from the undisturbed one, in the worst step of the stage.

    Of each metric that is no measurement of time, and not of rounding itself (`mismatch/`), relative to its largest
    value in the undisturbed run.
    """
    mine, other = (
        {line.step: line.values for line in read_metrics(each) if line.stage == STAGE} for each in (paths, reference)
    )
    assert mine.keys() == other.keys(), f"steps {sorted(mine)}, undisturbed {sorted(other)}"
    names = set.intersection(*(set(values) for step, values in other.items() if step > 0))
    distances = {}
    for name in sorted(name for name in names if not name.startswith((*NOT_COMPARED, "mismatch/"))):
        pairs = [(mine[step][name], values[name]) for step, values in other.items() if step > 0]
        scale = max(abs(value) for _, value in pairs)
        distances[name] = max(abs(value - twin) for value, twin in pairs) / (scale or 1.0)
    return distances
