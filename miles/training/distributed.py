"""The process group of the trainer ranks: start, end, and what rank 0 tells the others.

Owns no model parallelism; each backend builds its own groups on top of the default one.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from miles.errors import PortTaken, TrainerError

T = TypeVar("T")

RANK_TIMEOUT = timedelta(days=7)
"""Ranks wait for rank 0 as long as generation takes; the supervisor, not a timeout, notices a dead rank."""

END_MARGIN_SECONDS = 10.0
"""What an orderly end takes beside the last save: partial responses come back, processes go."""


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
        taken = "EADDRINUSE" in str(error) or "address already in use" in str(error)
        raise (PortTaken if taken else TrainerError)(
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


def raise_together(error: Exception | None) -> None:
    """Raise on every rank when any rank has an error: its own where it has one, else a copy. Collective.

    A rank that raised alone would leave the others waiting in their next collective operation.
    """
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = error or next((other for other in errors if other is not None), None)
    if first is not None:
        raise first


@contextmanager
def together(kind: type[Exception]) -> Iterator[None]:
    """An error of this kind inside, on any rank, is raised on all of them when the block ends. Collective; the block
    itself must not be."""
    error = None
    try:
        yield
    except kind as raised:
        error = raised
    raise_together(error)


class StopRequest:
    """Whether this attempt should end: it got SIGTERM, SIGINT, SIGUSR1 or SIGUSR2, or its time is nearly over.

    Handlers only set a flag; the loop asks at its boundaries. SIGUSR1 leaves the time until the deadline, where one is
    known: the cluster says early when a job's time is nearly over. The others leave the grace.
    """

    def __init__(self, *, deadline: float | None = None, grace_seconds: float = math.inf) -> None:
        """`deadline` in Unix seconds; `grace_seconds` are left after a signal until the process is killed."""
        self.last_save_seconds = 0.0
        """How much before the deadline the end must begin: what the last save is expected to take."""
        self._deadline = math.inf if deadline is None else deadline
        self._grace_seconds = grace_seconds
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._remember)
        self._signalled = False

    @classmethod
    def from_environment(cls) -> StopRequest:
        """As the supervisor says in MILES_DEADLINE and MILES_GRACE_SECONDS."""
        deadline = os.environ.get("MILES_DEADLINE")
        return cls(
            deadline=float(deadline) if deadline else None,
            grace_seconds=float(os.environ.get("MILES_GRACE_SECONDS", "inf")),
        )

    def _remember(self, number: int, frame: FrameType | None) -> None:
        first, self._signalled = not self._signalled, True
        unhurried = number == signal.SIGUSR1 and math.isfinite(self._deadline)
        if first and not unhurried:
            self._deadline = min(self._deadline, time.time() + self._grace_seconds)

    @property
    def requested(self) -> bool:
        """Whether this rank knows of a reason to end."""
        return self._signalled or self.seconds_left < END_MARGIN_SECONDS + 2 * self.last_save_seconds

    @property
    def seconds_left(self) -> float:
        """Until this process is killed, as far as it knows."""
        return self._deadline - time.time()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective."""
        flag = torch.tensor(int(self.requested))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
