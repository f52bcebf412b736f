"""Processes that run synchronous graders, so that a slow, hanging or crashing one cannot stop the trainer.

Owns the processes: starting them when first needed, one call at a time each, killing one whose call takes
too long, closing them. The child is `miles.rewards.child`; both ends talk over a socket pair.
(`concurrent.futures` would import the parent's main module, torch included, into every child.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from miles.errors import DataError
from miles.rewards.functions import scores_of

LOAD_SECONDS = 120.0
MAX_PROCESSES = 16


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one grader call; label and metadata as they were read from the data file."""

    prompt: str
    response: str
    label: Any
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call: scores, or the reason why there are none."""

    scores: dict[str, float]
    failure: str | None = None
    """The grader raised, timed out or crashed."""
    invalid: str | None = None
    """It returned something that is no reward."""


def judge(result: Any) -> Outcome:
    """The outcome of a call that returned `result`."""
    try:
        return Outcome(scores_of(result))
    except (TypeError, ValueError) as error:
        return Outcome({}, invalid=str(error))


class GraderProcess:
    """One child process, started by the first call; not thread-safe."""

    def __init__(self, grader: str, args: Mapping[str, Any]) -> None:
        self._grader = grader
        self._args = dict(args)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def call(self, call: Call, timeout: float) -> Outcome:
        """Run one call; after `timeout` seconds the process is killed, and the next call starts another."""
        try:
            connection = self._connection or self._start()
            connection.send(call)
            if not connection.poll(timeout):
                self.close()
                return Outcome({}, failure=f"took longer than {timeout:g} s")
            return connection.recv()
        except (EOFError, OSError):
            status = self._process.wait() if self._process else None
            self.close()
            return Outcome({}, failure=f"ended its process (exit status {status})")

    def kill(self) -> None:
        """Kill the process, if one runs; safe from another thread, whose call then fails."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process, if one runs, and forget it."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None

    def _start(self) -> Connection:
        ours, theirs = Pipe(duplex=True)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "miles.rewards.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection = ours
        ours.send((self._grader, self._args))
        if not ours.poll(LOAD_SECONDS):
            self.close()
            raise DataError(
                f"importing grader '{self._grader}' took longer than {LOAD_SECONDS:g} s",
                fix="do slow work in the first call, or write the grader as an async function",
            )
        problem = ours.recv()
        if problem is not None:
            self.close()
            raise problem
        return ours


class ProcessPool:
    """Up to as many processes as there are spare cores, for one grader.

    Threads wait; the event loop does not.
    """

    def __init__(self, grader: str, args: Mapping[str, Any]) -> None:
        count = max(1, min(MAX_PROCESSES, len(os.sched_getaffinity(0)) // 2))
        self._processes = [GraderProcess(grader, args) for _ in range(count)]
        self._idle: SimpleQueue[GraderProcess] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="grader")

    def call(self, call: Call, timeout: float) -> Outcome:
        """Run one call on an idle process; to be called in one of `threads`."""
        process = self._idle.get()
        try:
            return process.call(call, timeout)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End all processes; calls that wait are dropped, running ones fail."""
        for process in self._processes:
            process.kill()
        self.threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.close()
