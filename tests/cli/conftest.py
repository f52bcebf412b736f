"""The `miles` command in a process and a directory of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
Miles = Callable[..., subprocess.CompletedProcess[str]]

PREPARE_ONLY = """
name = "demo"
[steps.prepare]
kind = "tiny-task"
train_prompts = 64
heldout_prompts = 16
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A working directory with a run file."""
    (tmp_path / "run.toml").write_text(PREPARE_ONLY)
    return tmp_path


@pytest.fixture
def miles(directory: Path) -> Miles:
    """Run `miles ARGUMENTS` there."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "miles", *arguments]
        # No programs but Python's: there is no Slurm here, whatever the machine has.
        programs = str(Path(sys.executable).parent)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", "PATH": programs}
        return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)

    return run
