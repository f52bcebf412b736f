"""The process of a grader ends with its parent, and says nothing about it."""

import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest


def child(theirs: Connection) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "miles.rewards.child", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("asked", [False, True])
def test_parent_that_is_killed_leaves_no_traceback(asked: bool) -> None:
    ours, theirs = Pipe(duplex=True)
    if asked:
        ours.send(("exact", {}))
    with theirs:
        process = child(theirs)
    ours.close()  # before the child has answered: its answer meets a closed pipe
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.decode()) == (0, "")


def test_parent_that_dies_with_an_unread_answer_leaves_no_traceback() -> None:
    ours, theirs = Pipe(duplex=True)
    with theirs:
        process = child(theirs)
    ours.send(("exact", {}))
    assert ours.poll(60)
    ours.close()  # an unread answer makes the child's next read fail with ECONNRESET
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.decode()) == (0, "")
