"""What is checked and made before a run's driver starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from miles.cluster.local import prepare_run, start_driver, stop_run
from miles.config.load import load_resolved
from miles.errors import ConfigError, Interrupted, RunError
from miles.runs.claim import Claim
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


def test_prepared_run_has_the_files_config_with_overrides(file: Path) -> None:
    prepared = prepare_run(file, ["seed=3"], fresh=False)
    assert load_resolved(prepared.paths.root).seed == 3
    assert prepared.set_aside is None


def test_fresh_sets_the_earlier_run_aside_whatever_its_config(file: Path, tmp_path: Path) -> None:
    prepare_run(file, [], fresh=True)
    with pytest.raises(RunError, match="seed: 0 in the run, 3 now"):
        prepare_run(file, ["seed=3"], fresh=False)
    prepared = prepare_run(file, ["seed=3"], fresh=True)
    assert prepared.set_aside == tmp_path / "runs/demo.old-1"
    assert load_resolved(prepared.paths.root).seed == 3
    assert load_resolved(prepared.set_aside).seed == 0


def test_run_in_use_is_neither_opened_nor_set_aside(file: Path) -> None:
    paths = prepare_run(file, [], fresh=False).paths
    with Claim.acquire(paths), pytest.raises(RunError, match="in use"):
        prepare_run(file, [], fresh=True)
    assert paths.config.exists()


def test_wrong_file_leaves_no_run(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        prepare_run(file, ["steps.report.kind=rapport"], fresh=False)
    assert not (tmp_path / "runs").exists()


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
