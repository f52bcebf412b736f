"""Looking at processes from outside, for the tests of supervision."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil

from miles.runs.attempts import Attempt, read_attempts
from miles.runs.endpoints import Endpoint, read_endpoints
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


def end_of(process: subprocess.Popen[str], paths: RunPaths) -> tuple[int, Attempt]:
    """Exit code and last attempt of a supervisor, after which none of its processes is left."""
    code = process.wait(timeout=120)
    assert [record for record in recorded_processes(paths) if not gone(record["pid"])] == []
    return code, read_attempts(paths)[-1]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that its parent has not reaped yet has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def newest_pid(paths: RunPaths, role: str, index: int = 0) -> int:
    """Process id of the newest start of a rank or an engine."""
    records = [r for r in recorded_processes(paths) if (r["role"], r["index"]) == (role, index)]
    return int(records[-1]["pid"])


def engines_when(paths: RunPaths, condition: Callable[[list[Endpoint]], bool], what: str) -> list[Endpoint]:
    """The engines of the newest attempt, as soon as a condition holds for them."""
    found: list[Endpoint] = []

    def holds() -> bool:
        found[:] = read_endpoints(paths.latest_logs / "engines.json")
        return bool(found) and condition(found)

    wait_for(holds, what)
    return found


def waiting_pids(paths: RunPaths, rank: int = 0) -> list[int]:
    """Process ids of a waiting stand-in rank and of the process that it started."""
    file = paths.root / f"waiting-{rank}"
    wait_for(lambda: file.exists() and file.read_text().count(" ") == 1, f"rank {rank} to wait")
    return [int(pid) for pid in file.read_text().split()]
