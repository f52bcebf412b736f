"""Looking at processes from outside, for the tests of supervision."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil

from miles.runs.files import read_json_lines
from miles.runs.paths import RunPaths

STEP = "prepare"
Supervise = Callable[..., subprocess.Popen[str]]


def recorded_processes(paths: RunPaths) -> list[dict[str, Any]]:
    return [
        record for file in sorted(paths.all_logs.glob("attempt-*/processes.jsonl")) for record in read_json_lines(file)
    ]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until something is so; generous, because the machine may be busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that its parent has not reaped yet has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def waiting_pids(paths: RunPaths, rank: int = 0) -> list[int]:
    """Process ids of a waiting stand-in rank and of the process that it started."""
    file = paths.root / f"waiting-{rank}"
    wait_for(lambda: file.exists() and file.read_text().count(" ") == 1, f"rank {rank} to wait")
    return [int(pid) for pid in file.read_text().split()]
