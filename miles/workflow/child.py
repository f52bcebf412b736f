"""A Python module run in a process of its own for a command, whose error becomes the command's.

For work whose imports are heavy or whose code is foreign. Processes of a run belong to `miles.cluster`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from miles.errors import MilesError
from miles.runs.failures import FAILURE_VARIABLE, read_failure

_LOG_LINES = 20


def run_child(module: str, arguments: Sequence[str], what: str) -> None:
    """Run `python -m module arguments` to its end, its output kept back.

    Raises the MilesError that ended it, or one that calls it `what` and shows the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="miles-") as directory:
        failure = Path(directory) / "failure.json"
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {FAILURE_VARIABLE: str(failure)},
            check=False,
        )
        if done.returncode != 0:
            raise read_failure(failure) or _unexplained(what, done.returncode, done.stdout)


def _unexplained(what: str, code: int, output: str) -> MilesError:
    tail = "\n".join(output.splitlines()[-_LOG_LINES:])
    return MilesError(f"{what} ended with exit code {code}:\n{tail}")
