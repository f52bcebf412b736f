"""Ending with the process that started this one, however that one ended.

A supervisor that is killed cannot end its engines and ranks, and one that lives on without it could go on writing to
the run. So every process that it starts gets the reading end of a pipe whose writing end only the supervisor holds:
the system closes that one when the supervisor is gone. (Linux could send a signal instead, but to this process alone,
not to what it started, and when the *thread* that started it ends.)
"""

from __future__ import annotations

import os
import signal
from threading import Thread

PARENT_VARIABLE = "MILES_PARENT_PIPE"
"""Environment variable with the number of the pipe's descriptor."""


def end_with_parent() -> None:
    """From now on, kill this process and its process group at once when its parent is gone.

    To be called first in a process's main function. Does nothing in a process that no supervisor started.
    """
    number = os.environ.pop(PARENT_VARIABLE, None)
    if number is None:
        return
    descriptor = int(number)
    os.set_inheritable(descriptor, False)
    Thread(target=_wait, args=(descriptor,), name="end-with-parent", daemon=True).start()


def _wait(descriptor: int) -> None:
    os.read(descriptor, 1)  # nothing is ever written: it returns at the end of the file
    os.write(2, b"the process that started this one is gone; this one ends\n")
    os.killpg(os.getpgrp(), signal.SIGKILL)
