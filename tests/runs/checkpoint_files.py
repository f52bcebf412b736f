"""Checkpoints of a few small files, and a process that is killed before its n-th operation on the file system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from miles.runs.checkpoints import CheckpointInfo, CheckpointStore
from miles.runs.claim import Fence
from miles.runs.manifest import sum_files
from miles.runs.paths import RunPaths

FILES = {
    "trainer/__0_0.distcp": bytes(range(256)) * 40,
    "trainer/__1_0.distcp": b"\0" * 5000,
    "trainer/.metadata": b"metadata",
    "rng/rank-00000.pt": b"rng",
    "rollout.h5": b"\x89HDF\r\n",
    "empty": b"",
}

CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "open")
"""Audit events of operations that a crash can come before; `open` covers files about to be written."""


def store(root: Path, fence: Fence | None = None) -> CheckpointStore:
    paths = RunPaths(root)
    return CheckpointStore(paths, "grpo", fence or Fence(paths, None))


def info(step: int, metrics: dict[str, float] | None = None) -> CheckpointInfo:
    return CheckpointInfo(
        *("grpo", step, 3, 1.5e9, "f1" * 16, "fsdp", 2, 0.25, 0.05),
        metrics=metrics or {"loss": 0.1},
        trackers={"wandb": "ü"},
    )


def build(checkpoints: CheckpointStore, step: int, *, content: bytes = b"") -> Path:
    """A draft with FILES; `content` makes it differ from another."""
    draft = checkpoints.draft(step)
    for name, data in FILES.items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_bytes(data + content)
    return draft


def save(
    root: Path, step: int, *, content: bytes = b"", fence: Fence | None = None, metrics: dict[str, float] | None = None
) -> Path:
    """Commit a checkpoint whose trainer files were hashed by the ranks that wrote them."""
    checkpoints = store(root, fence)
    draft = build(checkpoints, step, content=content)
    sums = sum_files(draft, ["trainer/__0_0.distcp", "trainer/__1_0.distcp"])
    return checkpoints.commit(draft, info(step, metrics), sums)


def killed_at_every_change(action: Callable[[], object]) -> Iterator[int]:
    """Run `action` in a process that SIGKILLs itself before its n-th change of the file system, for n = 1, 2 ...

    Yields n after each death, and ends when the process came through alive. The caller restores what `action` needs.
    """
    number = 1
    while True:
        child = os.fork()
        if child == 0:
            _run_and_exit(action, number)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the action itself failed"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield number
        number += 1


def _run_and_exit(action: Callable[[], object], last: int) -> None:
    count = 0

    def kill(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in CHANGES:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.addaudithook(kill)
        action()
        code = 0
    finally:
        os._exit(code)
