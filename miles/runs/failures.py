"""How a process of a run tells its parent what went wrong: a small JSON file beside its log.

An exit code and a log are not enough to show a person one clear message. A process that is started with
`MILES_FAILURE_FILE` in its environment writes the MilesError that ended it there; the parent reads it and
raises the same error. A process that dies of anything else leaves no file, and the parent shows the end of
its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from miles import errors
from miles.errors import MilesError, RunError
from miles.runs.files import write_atomic

FAILURE_VARIABLE = "MILES_FAILURE_FILE"


def exit_with_failures(main: Callable[[], None]) -> NoReturn:
    """Run a process's main function and exit: 0, or the exit code of the MilesError that it raised.

    The error goes to stderr (the log) and, where the parent asked for it, into the failure file. Any other
    exception keeps its traceback and exit code 1.
    """
    try:
        main()
    except MilesError as error:
        sys.stderr.write(f"error: {error}\n")
        failure_file = os.environ.get(FAILURE_VARIABLE)
        if failure_file:
            with contextlib.suppress(RunError):  # a full disk: the exit code still tells
                write_failure(Path(failure_file), error)
        sys.exit(error.exit_code)
    sys.exit(0)


def write_failure(path: Path, error: MilesError) -> None:
    """Write an error for the parent process, as the nearest class that `miles.errors` has."""
    known = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    record = {"kind": next(known), "message": error.message, "fix": error.fix}
    write_atomic(path, json.dumps(record) + "\n")


def read_failure(path: Path) -> MilesError | None:
    """The error that a child process wrote; None when it wrote none."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return getattr(errors, record["kind"])(record["message"], fix=record["fix"])
