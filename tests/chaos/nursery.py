"""Worker and engine processes that are forked from one interpreter which has imported everything, in place of seconds
of imports each. In them runs the same main function, with the same arguments and environment, as under a supervisor.

    python -m tests.chaos.nursery

reads requests from stdin, JSON lines, and answers each on stdout. `Nursery` is the other end of it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from miles.cluster.cpu import cpu_environment
from tests.chaos.run import REPOSITORY, kill

WARM = ("miles.training.rl", "miles.training.sft", "miles.engines.embedded.launch", "miles.training.evaluation")
BACKENDS = {"megatron": "miles.training.megatron.backend", "fsdp": "miles.training.fsdp.backend"}


class Nursery:
    """A process that starts others by forking. Use it in a `with` statement; at the end all are killed."""

    def __init__(self, backend: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery", backend],
            cwd=REPOSITORY,
            env=os.environ | cpu_environment(threads=1, processes=1, cores=1) | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running: set[int] = set()

    def start(self, module: str, arguments: list[str], environment: dict[str, str], log: Path) -> int:
        """Run a module's `main` in a new process; returns its id."""
        request = {"module": module, "arguments": arguments, "environment": environment, "log": str(log)}
        pid = self._ask({"start": request})
        self._running.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """Exit code, negative for a signal."""
        self._running.discard(pid)
        return self._ask({"wait": pid})

    def end(self, pid: int) -> None:
        """Kill a process that may have ended."""
        kill(pid)
        self.wait(pid)

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in list(self._running):
            self.end(pid)
        self._process.communicate()


def _start(module: str, arguments: list[str], environment: dict[str, str], log: str) -> int:
    pid = os.fork()
    return pid if pid else _become(module, arguments, environment, log)


def _become(module: str, arguments: list[str], environment: dict[str, str], log: str) -> NoReturn:
    """Turn this fork into the process that was asked for."""
    from miles.runs.failures import exit_with_failures

    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    exit_with_failures(importlib.import_module(module).main)


def _serve(backend: str) -> None:
    for module in (*WARM, BACKENDS[backend]):
        importlib.import_module(module)
    for line in sys.stdin:
        match json.loads(line):
            case {"start": request}:
                answer = _start(**request)
            case {"wait": pid}:
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(answer, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
