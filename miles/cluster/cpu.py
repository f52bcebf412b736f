"""The environment in which many processes behave on the CPU cores of one node."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_environment(*, threads: int | None, processes: int, cores: int) -> dict[str, str]:
    """Environment of one of `processes` equal processes; `threads` None: the cores are divided among them.

    Trainer and engines work in turns, so each side gets all cores. Threads that spin while the other side
    works cost two to four times the time, so they sleep instead.

    On Intel processors MKL takes kernels by the number of rows and by how memory is aligned, so that a response would
    depend on what else is in the batch. In its mode of conditional numerical reproducibility, strict, it does not; on
    AMD's that mode has the opposite effect.
    """
    count = threads if threads is not None else max(1, cores // processes)
    environment = {
        "OMP_NUM_THREADS": str(count),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if _is_intel():
        environment["MKL_CBWR"] = "AVX2,STRICT"
    return environment


def _is_intel() -> bool:
    return sys.platform == "linux" and "GenuineIntel" in Path("/proc/cpuinfo").read_text()


def rank_environment(
    rank: int, *, local_ranks: range, world: int, address: str, port: int, interface: str
) -> dict[str, str]:
    """What torch.distributed reads in one rank. `local_ranks`: those of this node; `interface`: by which they reach
    those of other nodes. LOCAL_RANK also selects the GPU.
    """
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_ranks.index(rank)),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(len(local_ranks)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": interface,
    }
    if world > len(local_ranks) and "NCCL_SOCKET_IFNAME" not in os.environ:
        environment["NCCL_SOCKET_IFNAME"] = f"={interface}"
    return environment
