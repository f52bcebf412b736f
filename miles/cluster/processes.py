"""Starting processes, seeing them end, and ending them: only those started here, by their recorded ids.

Every child leads a session and process group of its own, so that the terminal's Ctrl-C does not reach it and
so that ending it ends what it started. A child that has ended is left unreaped until `end` is called: until
then the system cannot give its process group's number to anybody else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from miles.errors import MilesError
from miles.runs.attempts import read_attempts
from miles.runs.failures import FAILURE_VARIABLE, read_failure
from miles.runs.files import append_json, read_json_lines
from miles.runs.identity import ProcessIdentity
from miles.runs.paths import RunPaths

POLL_SECONDS = 0.1
_LOG_TAIL_BYTES = 16384


@dataclass(frozen=True, slots=True)
class Command:
    """A Python module to run, and its place in the run."""

    role: str
    """`engine`, `trainer` or `step`."""
    index: int
    module: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """Added to this process's environment."""


class Child:
    """A process that was started here."""

    def __init__(self, command: Command, process: subprocess.Popen[bytes], log: Path, failure: Path) -> None:
        self.command = command
        self.log = log
        self._process = process
        self._failure = failure

    @property
    def name(self) -> str:
        return f"{self.command.role} {self.command.index}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs. Does not reap the process."""
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def failure(self) -> MilesError | None:
        """The error that ended it, where it said so itself."""
        return read_failure(self._failure)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone; nothing happens when it has ended."""
        if self.exit_code() is None:
            self._process.send_signal(number)

    def end(self) -> int:
        """Kill whatever is left of the process and of what it started, and reap it; returns the exit code."""
        if self._process.returncode is None:
            _kill_group(self.pid)
        return self._process.wait()


def start(command: Command, paths: RunPaths, attempt: int) -> Child:
    """Start a process with its log in the attempt's directory, and record it there."""
    logs = paths.logs(attempt)
    stem = f"{command.role}-{socket.gethostname()}-{command.index}"
    log, failure = logs / f"{stem}.log", logs / f"{stem}.failure.json"
    failure.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", FAILURE_VARIABLE: str(failure)} | command.environment
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", command.module, *command.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    record = ProcessIdentity.of(process.pid).record()
    append_json(_ledger(paths, attempt), {"role": command.role, "index": command.index, **record})
    return Child(command, process, log, failure)


def first_dead(children: Iterable[Child]) -> Child | None:
    """The first of the children that has ended, in their order."""
    return next((child for child in children if child.exit_code() is not None), None)


def terminate(children: list[Child], *, grace: float, hurry: Callable[[], bool]) -> None:
    """Ask the children to end (SIGTERM), wait up to `grace` seconds or until `hurry()`, then kill them.

    Returns when all are reaped.
    """
    for child in children:
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace
    while any(child.exit_code() is None for child in children):
        if hurry() or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    for child in children:
        child.end()


def end_leftovers(paths: RunPaths) -> list[str]:
    """Kill the processes that a killed supervisor left on this host; returns their names.

    Call it with the run claimed: then every attempt without an end is over. A process is recognized by pid
    and start time.
    """
    ended = []
    for attempt in read_attempts(paths):
        if attempt.ended is not None:
            continue
        for record in read_json_lines(_ledger(paths, attempt.number)):
            identity = ProcessIdentity(record["host"], record["pid"], record["started"])
            if identity.local and identity.alive():
                _kill_group(identity.pid)
                ended.append(f"{record['role']} {record['index']} (process {identity.pid})")
    return ended


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody but a zombie is left
        os.killpg(leader, signal.SIGKILL)


def _ledger(paths: RunPaths, attempt: int) -> Path:
    return paths.logs(attempt) / "processes.jsonl"
