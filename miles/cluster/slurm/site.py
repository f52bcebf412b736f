"""What a cluster has: partitions, kinds of nodes, settings. Parses what scontrol and sinfo print; runs no command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from miles.cluster.slurm.states import duration, key_values


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition. Times in seconds; None: no limit, or not said."""

    name: str
    default: bool
    up: bool
    max_time: int | None
    default_time: int | None
    max_nodes: int | None
    nodes: int
    priority_tier: int
    preempt_mode: str
    """`REQUEUE`, `CANCEL`, `SUSPEND`, `OFF`, as the partition says."""
    grace: int
    """Seconds between the signal of a preemption and the kill."""


def parse_partition(line: str) -> Partition | None:
    """The partition in a line of `scontrol -o show partition`; None where there is none."""
    fields = key_values(line)
    if "PartitionName" not in fields:
        return None
    return Partition(
        name=fields["PartitionName"],
        default=fields.get("Default") == "YES",
        up=fields.get("State") == "UP",
        max_time=duration(fields.get("MaxTime", "")),
        default_time=duration(fields.get("DefaultTime", "")),
        max_nodes=_number(fields.get("MaxNodes", "")),
        nodes=_number(fields.get("TotalNodes", "")) or 0,
        priority_tier=_number(fields.get("PriorityTier", "")) or 0,
        preempt_mode=fields.get("PreemptMode", ""),
        grace=_number(fields.get("GraceTime", "")) or 0,
    )


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes of one partition with the same resources and state."""

    FORMAT: ClassVar[str] = "%R|%D|%t|%c|%m|%G"

    partition: str
    count: int
    state: str
    """Compact: `idle`, `mix`, `alloc`, `down*`, `drain`, ..."""
    cpus: int
    memory_mb: int
    gpus: dict[str, int]
    """Number of GPUs of a node by type; the type is empty where the site gives none."""

    @property
    def usable(self) -> bool:
        """Whether the nodes run jobs."""
        return self.state.rstrip("*~#!%$@^-+") in ("idle", "mix", "alloc", "comp", "resv", "plnd", "npc") and (
            "*" not in self.state
        )


def parse_node_groups(text: str) -> list[NodeGroup]:
    """Groups in the output of `sinfo -h -o NodeGroup.FORMAT`."""
    groups = []
    for line in text.splitlines():
        values = line.strip().split("|", 5)
        if len(values) == 6:
            partition, count, state, cpus, memory, gres = values
            # A + says that nodes of the group have more.
            numbers = [_number(value.rstrip("+")) or 0 for value in (count, cpus, memory)]
            groups.append(NodeGroup(partition, numbers[0], state, numbers[1], numbers[2], parse_gpus(gres)))
    return groups


def parse_gpus(gres: str) -> dict[str, int]:
    """GPUs by type in a list of generic resources: `gpu:h100:4(S:0-1),nvme:1` is `{"h100": 4}`."""
    gpus: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        found = re.fullmatch(r"gpu(?::([^:]*[^:\d][^:]*))?(?::(\d+))?", part.strip())
        if found:
            name = found[1] or ""
            gpus[name] = gpus.get(name, 0) + int(found[2] or 1)
    return gpus


def parse_config(text: str) -> dict[str, str]:
    """Settings in the output of `scontrol show config`; those that are not set are left out."""
    found = re.findall(r"^(\S+)\s+=[ \t]*(.*?)[ \t]*$", text, flags=re.MULTILINE)
    return {name: value for name, value in found if value not in ("", "(null)")}


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
