"""Runs from the first command to the last, with the real tiny-task step."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.cluster.local import stop_run
from miles.runs.attempts import read_attempts
from miles.runs.claim import current_holder
from miles.runs.paths import RunPaths
from tests.cli.conftest import REPOSITORY, Miles


@pytest.fixture
def run(directory: Path) -> Iterator[RunPaths]:
    """The run of the run file; a driver that a failed test left is stopped."""
    paths = RunPaths(directory / "runs/demo")
    yield paths
    if current_holder(paths) is not None:
        stop_run(paths, now=True, timeout=60.0)


def _wait_for_holder(run: RunPaths) -> int:
    """Process id of the driver, once it has claimed the run."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        holder = current_holder(run)
        if holder is not None:
            return holder.identity.pid
        time.sleep(0.05)
    raise AssertionError("the driver did not claim the run")


def test_run_is_done_continued_and_looked_at(miles: Miles, run: RunPaths) -> None:
    done = miles("submit", "run.toml", "--local")
    assert done.returncode == 0, done.stderr
    assert "demo: 1 of 1 steps done" in done.stdout
    assert "next: miles report demo" in done.stdout
    assert (run.step("prepare") / "model/config.json").exists()

    again = miles("submit", "runs/demo/run.toml", "--local")
    assert again.returncode == 0, again.stderr
    assert len(read_attempts(run)) == 1, "a step that is done does not run again"

    status = json.loads(miles("status", "--json").stdout)
    assert (status["state"], status["steps"][0]["state"]) == ("done", "done")
    assert "✓" in miles("status", "demo").stdout
    (listed,) = json.loads(miles("runs", "--json").stdout)
    assert (listed["name"], listed["done"], listed["steps"]) == ("demo", 1, 1)
    assert "step prepare: done" in miles("logs", "demo", "--role", "driver").stdout
    assert miles("watch").returncode == 0
    assert miles("stop").returncode == 4

    other = miles("submit", "run.toml", "--local", "--set", "seed=5")
    assert other.returncode == 4
    assert "seed: 0 in the run, 5 now" in other.stderr


def test_detached_run_refuses_a_second_submit_and_is_stopped(miles: Miles, run: RunPaths) -> None:
    started = miles("submit", "run.toml", "--local", "--detach")
    assert started.returncode == 0, started.stderr
    assert "next: miles watch demo" in started.stdout
    driver = _wait_for_holder(run)
    second = miles("submit", "run.toml", "--local")
    assert second.returncode == 4
    assert f"in use by process {driver}" in second.stderr
    stopped = miles("stop", "demo")
    assert stopped.returncode == 0, stopped.stderr
    assert "next: miles resume demo" in stopped.stdout
    assert current_holder(run) is None
    assert read_attempts(run)[-1].reason == "stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_terminals_command_stops_the_run(directory: Path, run: RunPaths, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "miles", "submit", "run.toml", "--local"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True)
    _wait_for_holder(run)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "stopped" in errors
    assert "the same command continues the run" in errors
    assert current_holder(run) is None
