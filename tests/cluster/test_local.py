"""The driver of a run as its parent sees it."""

import subprocess
import sys
from pathlib import Path

import pytest

from miles.cluster.local import start_driver, stop_run
from miles.errors import Interrupted, RunError
from miles.workflow.prepare import prepare_run
from tests.cluster.helpers import gone

RUN = """
name = "demo"
runs_dir = "{runs}"
[steps.report]
kind = "report"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(runs=tmp_path / "runs"))
    return file


def test_driver_that_was_killed_is_an_error_that_names_its_log(file: Path) -> None:
    paths = prepare_run(file, [], fresh=False).paths
    driver = start_driver(paths)
    subprocess.run([sys.executable, "-c", f"import os; os.kill({driver.pid}, 9)"], check=True)
    failure = driver.failure()
    assert isinstance(failure, RunError)
    assert "exit code -9" in failure.message
    assert str(paths.driver_log) in str(failure.fix)
    assert gone(driver.pid)


def test_driver_that_is_stopped_at_once_is_no_fault(file: Path) -> None:
    driver = start_driver(prepare_run(file, [], fresh=False).paths)
    driver.stop()
    assert isinstance(driver.failure(), Interrupted)


def test_run_that_nobody_drives_cannot_be_stopped(file: Path) -> None:
    paths = prepare_run(file, [], fresh=False).paths
    with pytest.raises(RunError, match="is not running"):
        stop_run(paths, now=False, timeout=1.0)
