"""A run directory and a supervisor process whose workers and engines are stand-ins."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from miles.config.schema import ReportStep, RunConfig, TinyTaskStep
from miles.runs.directory import create_run
from miles.runs.failures import FAILURE_VARIABLE
from miles.runs.paths import RunPaths
from tests.cluster.helpers import STEP, Supervise, recorded_processes

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    steps = {STEP: TinyTaskStep(kind="tiny-task"), "report": ReportStep(kind="report", needs=[STEP])}
    return create_run(RunConfig(name="demo", runs_dir=str(tmp_path / "runs"), steps=steps))


@pytest.fixture
def supervise(paths: RunPaths) -> Iterator[Supervise]:
    """Start a supervisor; whatever it leaves running is killed after the test."""
    started = []

    def start(
        *,
        worker: str = "succeed",
        engine: str = "serve",
        ranks: int = 1,
        engines: int = 0,
        local: dict[str, float] | None = None,
        **engine_section: float,
    ) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent / 'standins'}",
            "STANDIN_WORKER": worker,
            "STANDIN_ENGINE": engine,
            FAILURE_VARIABLE: str(paths.root / "failure.json"),
        }
        command = [sys.executable, "-m", "standin_driver", str(paths.root), STEP]
        command += [str(ranks), str(engines), json.dumps(local or {}), json.dumps(engine_section)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for record in recorded_processes(paths):
        if psutil.pid_exists(record["pid"]):
            os.killpg(record["pid"], 9)
