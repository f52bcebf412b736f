"""The nodes that a Slurm job gave this run, as one of them sees it in its environment.

Owns what the batch script and srun tell a node, nothing that has to be looked up: addresses belong to
`miles.cluster.network`, what the head tells the others to `miles.cluster.launch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miles.errors import RunError
from miles.runs.identity import NODE_VARIABLE

HOSTS_VARIABLE = "MILES_HOSTS"
END_VARIABLE = "MILES_JOB_END"
GRACE_VARIABLE = "MILES_GRACE"
LIVE_JOBS_VARIABLE = "MILES_LIVE_JOBS"
ADDRESS_VARIABLE = "MILES_NODE_ADDRESS"

DEFAULT_GRACE_SECONDS = 30.0
"""Slurm's own between the signal and the kill, KillWait, where nobody says."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """One run of a Slurm job, and which of its nodes this is."""

    job: int
    restart: int
    """How often the job was put back into the queue before."""
    index: int
    """Of this node; 0 is the head."""
    nodes: tuple[str, ...]
    """Slurm's names of all nodes, by index."""
    end: float | None = None
    """Unix time at which the job's time limit ends it; None: there is none."""
    grace: float = DEFAULT_GRACE_SECONDS
    """Seconds between the signal of a preemption and the kill."""
    live_jobs: frozenset[int] | None = None
    """This user's jobs that had not ended when the job began; None: not known."""
    address: str | None = None
    """Of this node, where the user has chosen it; None: that by which the other nodes are reached."""
    launch_address: str | None = None
    """Of the head, as srun knows it."""

    @property
    def name(self) -> str:
        """Slurm's name of this node."""
        return self.nodes[self.index]

    @property
    def port_seed(self) -> int:
        """Where this node begins its search for ports: another place than any other job, run or node that is near."""
        return 64 * (self.job * 64 + self.restart * 16 + self.index)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Allocation:
        """As the batch script and srun say. Raises RunError where they say nothing, or what cannot be."""
        job = _number(environment, "SLURM_JOB_ID")
        index = _number(environment, "SLURM_NODEID")
        if job is None or index is None:
            missing = "SLURM_JOB_ID" if job is None else "SLURM_NODEID"
            raise RunError(
                f"this process is not a task of a Slurm job: {missing} is not set",
                fix="`miles submit RUN_FILE` starts it; `--local` runs without Slurm",
            )
        own = environment.get(NODE_VARIABLE, "")
        hosts = environment.get(HOSTS_VARIABLE, "")
        nodes = tuple(filter(None, hosts.split(","))) or ((own,) if own else ())
        if index >= len(nodes):
            raise RunError(
                f"this is node {index} of job {job}, which has {len(nodes)} nodes by {HOSTS_VARIABLE} = '{hosts}'",
                fix="start one task on each node: `srun --ntasks-per-node=1`, with `scontrol show hostnames` in it",
            )
        if own and nodes[index] != own:
            raise RunError(
                f"node {index} of job {job} is {nodes[index]} by {HOSTS_VARIABLE}, and {own} by {NODE_VARIABLE}",
                fix="start one task on each node of the job, in the job's order",
            )
        live = environment.get(LIVE_JOBS_VARIABLE, "")
        return cls(
            job=job,
            restart=_number(environment, "SLURM_RESTART_COUNT") or 0,
            index=index,
            nodes=nodes,
            end=_seconds(environment, END_VARIABLE),
            grace=_or(_seconds(environment, GRACE_VARIABLE), DEFAULT_GRACE_SECONDS),
            live_jobs=frozenset(map(int, live.replace(",", " ").split())) if live else None,
            address=environment.get(ADDRESS_VARIABLE) or None,
            launch_address=environment.get("SLURM_LAUNCH_NODE_IPADDR") or None,
        )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    if value and not value.isdecimal():
        raise RunError(f"{name} = '{value}' is not a number", fix="Slurm sets it; let the batch script keep it")
    return int(value) if value else None


def _seconds(environment: Mapping[str, str], name: str) -> float | None:
    value = environment.get(name, "")
    try:
        return float(value) if value else None
    except ValueError:
        raise RunError(f"{name} = '{value}' is not a number of seconds", fix="leave it to the batch script") from None


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
