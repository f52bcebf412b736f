"""Starting processes, seeing them end, and ending them: only those started here, by their recorded ids.

Every child leads a session and process group of its own, so that the terminal's Ctrl-C does not reach it and
so that ending it ends what it started. A child that has ended is left unreaped until `end` is called: until
then the system cannot give its process group's number to anybody else.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from miles.errors import MilesError
from miles.runs.attempts import read_attempts
from miles.runs.claim import CLAIM_VARIABLE
from miles.runs.failures import FAILURE_VARIABLE, read_failure
from miles.runs.files import append_json, disk_errors, read_json_lines
from miles.runs.identity import ProcessIdentity, node_name
from miles.runs.parent import PARENT_VARIABLE
from miles.runs.paths import RunPaths

POLL_SECONDS = 0.1
_KILL_SECONDS = 30.0
_LOG_TAIL_BYTES = 16384

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Command:
    """A Python module to run, and its place in the run."""

    role: str
    """`engine`, `trainer` or `step`."""
    index: int
    module: str
    arguments: list[str] = field(default_factory=list)
    """Beside the run directory and the step."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to this process's environment."""


class Child:
    """A process that was started here."""

    def __init__(
        self, command: Command, process: subprocess.Popen[bytes], log: Path, begin: int, failure: Path, lifeline: int
    ) -> None:
        """`begin`: where its log begins in the file. `lifeline`: descriptor whose closing ends it (`runs.parent`)."""
        self.command = command
        self.log = log
        self._process = process
        self._begin = begin
        self._failure = failure
        self._lifeline = lifeline

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
            file.seek(max(self._begin, self.log.stat().st_size - _LOG_TAIL_BYTES))
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
            self._process.wait()
            os.close(self._lifeline)
        return self._process.returncode

    def death(self) -> str:
        """How it ended, and the end of its log."""
        code = self.exit_code()
        assert code is not None
        if code >= 0:
            how = f"ended with exit code {code}"
        else:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (the system does that when memory runs out)"
        return f"{self.name} (process {self.pid}) {how}\n{self.end_of_log()}"

    def whole_log(self) -> str:
        """The command that shows its log, in a sentence."""
        return f"`miles logs {self.log.parents[2].name} --role {self.command.role}` shows the whole log"

    def end_of_log(self) -> str:
        """The end of its log, with the file's name."""
        tail = self.log_tail()
        return f"end of {self.log}:\n{tail}" if tail else f"its log {self.log} is empty"


class Launcher:
    """Starts this node's processes of one attempt of one step."""

    def __init__(
        self, paths: RunPaths, step: str, attempt: int, claim: int, *, node: int = 0, port_seed: int | None = None
    ) -> None:
        """`claim` is the number of the claim under which the attempt runs: its processes check it before they write.
        `port_seed`: where this node begins its search for ports; None: where no other supervisor of this host does.
        """
        self.paths = paths
        self.step = step
        self.attempt = attempt
        self.port_seed = 64 * os.getpid() if port_seed is None else port_seed
        self.claim = claim
        self.node_name = node_name()
        self._node = node
        self._environment = {
            "PYTHONUNBUFFERED": "1",
            "MILES_ATTEMPT": str(attempt),
            CLAIM_VARIABLE: str(claim),
        }

    def start(self, command: Command) -> Child:
        """Start a process with its log in the attempt's directory, and record it there.

        A later start of the same role and index appends to the log of the earlier one, after a line that says so.
        """
        logs = self.paths.logs(self.attempt)
        stem = f"{command.role}-{self.node_name}-{command.index}"
        log_file, failure = logs / f"{stem}.log", logs / f"{stem}.failure.json"
        failure.unlink(missing_ok=True)
        reader, writer = os.pipe()
        variables = {FAILURE_VARIABLE: str(failure), PARENT_VARIABLE: str(reader)}
        arguments = ["--run-dir", str(self.paths.root), "--step", self.step, *command.arguments]
        with disk_errors(log_file), log_file.open("ab") as output:
            if output.tell():
                output.write(f"\n---- {command.role} {command.index} is started again ----\n".encode())
                output.flush()
            begin = output.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", command.module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment | variables | command.environment,
                pass_fds=[reader],
                start_new_session=True,
            )
        os.close(reader)
        record = ProcessIdentity.of(process.pid).record()
        append_json(
            _ledger(self.paths, self.attempt, self._node), {"role": command.role, "index": command.index, **record}
        )
        child = Child(command, process, log_file, begin, failure, writer)
        log.info("step %s: started %s, process %d, log %s", self.step, child.name, child.pid, log_file)
        return child


def wait_for_ends(children: list[Child], *, grace: float, hurry: Callable[[], bool]) -> None:
    """Wait until all children have ended, at most `grace` seconds or until `hurry()`."""
    deadline = time.monotonic() + grace
    while any(child.exit_code() is None for child in children):
        if hurry() or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)


def terminate(
    children: list[Child],
    *,
    grace: float,
    hurry: Callable[[], bool],
    number: signal.Signals = signal.SIGTERM,
) -> None:
    """Ask the children to end by a signal, wait up to `grace` seconds or until `hurry()`, then kill them.

    Returns when all are reaped.
    """
    for child in children:
        child.signal(number)
    wait_for_ends(children, grace=grace, hurry=hurry)
    for child in children:
        child.end()


def end_leftovers(paths: RunPaths) -> list[str]:
    """Kill what earlier attempts of this run left on this node, and wait until it is gone; returns its names.

    Call it with the run claimed, and before this attempt starts anything here: then all of it is of the past.
    """
    names, killed = [], []
    sessions = _sessions()
    for attempt in read_attempts(paths):
        records = itertools.chain.from_iterable(map(read_json_lines, _ledgers(paths, attempt.number)))
        for record in records:
            members = _session(ProcessIdentity.parse(record), sessions, paths)
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if members:
                names.append(f"{record['role']} {record['index']} (process {record['pid']})")
                killed += members
    psutil.wait_procs(killed, timeout=_KILL_SECONDS)
    return names


def _sessions() -> dict[int, list[psutil.Process]]:
    """The live processes of this host by session."""
    sessions: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        session = _session_of(process)
        if session is not None:
            sessions.setdefault(session, []).append(process)
    return sessions


def _session(
    leader: ProcessIdentity, sessions: dict[int, list[psutil.Process]], paths: RunPaths
) -> list[psutil.Process]:
    """The live processes of the session that a recorded process began: itself, and what it started.

    The system gives a session's number to nobody else while the session has processes. When the leader is gone, the
    session that bears its number may still be a later one: then only processes that know this run are meant.
    """
    if not leader.local or (psutil.pid_exists(leader.pid) and not leader.present()):
        return []
    members = sessions.get(leader.pid, [])
    if psutil.pid_exists(leader.pid):
        return members
    return [process for process in members if _knows(process, paths)]


def _session_of(process: psutil.Process) -> int | None:
    """Session of a process that runs."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
        return None


def _knows(process: psutil.Process, paths: RunPaths) -> bool:
    """Whether a process descends from one that was started for this run."""
    try:
        return process.environ().get(FAILURE_VARIABLE, "").startswith(f"{paths.all_logs}/")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody but a zombie is left
        os.killpg(leader, signal.SIGKILL)


def _ledger(paths: RunPaths, attempt: int, node: int) -> Path:
    """Every node has one of its own: appending is not atomic between nodes."""
    return paths.logs(attempt) / ("processes.jsonl" if node == 0 else f"processes-{node}.jsonl")


def _ledgers(paths: RunPaths, attempt: int) -> list[Path]:
    return sorted(paths.logs(attempt).glob("processes*.jsonl"))
