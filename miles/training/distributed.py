"""The process group of the trainer ranks: start, end, and what rank 0 tells the others.

Owns no model parallelism; each backend builds its own groups on top of the default one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from miles.errors import TrainerError

T = TypeVar("T")

RANK_TIMEOUT = timedelta(days=7)
"""Ranks wait for rank 0 as long as generation takes; the supervisor, not a timeout, notices a dead rank."""


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """This rank's device: GPU LOCAL_RANK where there is one and it is wanted, else the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default process group, from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: gloo, and NCCL for GPU tensors."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=RANK_TIMEOUT)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainerError(
            f"the trainer ranks cannot meet at {where}: {error}", fix="submit again: another port will be tried"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_rank_zero(value: T | None) -> T:
    """What rank 0 passed, on every rank. Collective; the others pass None."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


class StopRequest:
    """Remembers SIGTERM, SIGINT, SIGUSR1 and SIGUSR2. Handlers only set a flag; the loop asks at its boundaries."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective."""
        flag = torch.tensor(int(self.requested))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
