"""Who a process is, beyond a pid that the system hands out again: host, pid and start time."""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass
from typing import Any

import psutil

# Start times are computed from the boot time, which moves a little when the clock is set.
_CLOCK_TOLERANCE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one host."""

    host: str
    pid: int
    started: float
    """Unix time at which the process started, in seconds."""

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessIdentity:
        """Identity of a process of this host; None: of the calling process. Raises psutil.NoSuchProcess."""
        process = psutil.Process(pid)
        return cls(socket.gethostname(), process.pid, process.create_time())

    @classmethod
    def parse(cls, record: dict[str, Any]) -> ProcessIdentity:
        return cls(record["host"], record["pid"], record["started"])

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def local(self) -> bool:
        """Whether it is a process of this host."""
        return self.host == socket.gethostname()

    def alive(self) -> bool:
        """Whether the process still runs. One of another host cannot be asked, and counts as running."""
        if not self.local:
            return True
        try:
            return self.present() and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def present(self) -> bool:
        """Whether a process of this host still bears the pid: it runs, or has ended and nobody has asked how."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < _CLOCK_TOLERANCE_SECONDS
        except psutil.NoSuchProcess:
            return False
