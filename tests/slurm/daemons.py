"""The daemons of a cluster of the testbed: each has a pid file and a log in the cluster's directory.

Owns starting them, knowing whether they live, and ending them. What they are and need belongs to testbed.py and
accounting.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60.0


@dataclass(frozen=True)
class Daemons:
    """Those of the cluster in a directory. A daemon goes by its program, and a suffix where there are several."""

    directory: Path
    environment: Mapping[str, str]

    def start(self, name: str, *command: str, detaches: bool = True) -> None:
        """Start a daemon. `detaches`: it goes to the background itself when it has begun."""
        self.pid_file(name).unlink(missing_ok=True)
        with (self.directory / "log" / f"{name}.start").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self.environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if detaches and (code := process.wait(timeout=START_SECONDS)):
            raise RuntimeError(f"{name} ended with {code}")

    def pid_file(self, name: str) -> Path:
        return self.directory / "run" / f"{name}.pid"

    def pid(self, name: str) -> int | None:
        """The live process of a pid file; another process that has the number by now does not count."""
        try:
            pid = int(self.pid_file(name).read_text())
            status = Path(f"/proc/{pid}/status").read_text()
        except (OSError, ValueError):
            return None
        alive = f"Name:\t{name.split('.')[0]}\n" in status and "State:\tZ" not in status
        return pid if alive else None

    def end(self, name: str) -> None:
        """SIGTERM, and SIGKILL where that does not help."""
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
            pid = self.pid(name)
            if pid is None:
                return
            os.kill(pid, number)
            until(lambda: self.pid(name) is None, seconds)


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so; False when it is not after so many seconds."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
