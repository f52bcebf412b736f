"""Who a process is, beyond a pid that the system hands out again: host, node of the cluster, pid and start time."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from typing import Any

import psutil

# Start times are computed from the boot time, which moves a little when the clock is set.
_CLOCK_TOLERANCE_SECONDS = 2.0

NODE_VARIABLE = "SLURMD_NODENAME"
"""Environment variable with the name that Slurm has for this node. Clusters for tests have several on one host."""


def node_name() -> str:
    """What this node is called: in a job as Slurm calls it, else the host's name."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one host."""

    host: str
    pid: int
    started: float
    """Unix time at which the process started, in seconds."""
    node: str = ""
    """Slurm's name of its node; empty outside of jobs."""

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessIdentity:
        """Identity of a process of this host; None: of the calling process. Raises psutil.NoSuchProcess."""
        process = psutil.Process(pid)
        return cls(socket.gethostname(), process.pid, process.create_time(), os.environ.get(NODE_VARIABLE, ""))

    @classmethod
    def parse(cls, record: dict[str, Any]) -> ProcessIdentity:
        return cls(record["host"], record["pid"], record["started"], record.get("node", ""))

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def local(self) -> bool:
        """Whether it is a process of this host, and not of another node that only shares the host."""
        here = os.environ.get(NODE_VARIABLE, "")
        return self.host == socket.gethostname() and (not self.node or not here or self.node == here)

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
