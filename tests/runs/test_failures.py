import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles.errors import DataError, MilesError
from miles.runs.failures import FAILURE_VARIABLE, read_failure, write_failure

CHILD = """
from miles.errors import DataError
from miles.runs.failures import exit_with_failures
def main():
    raise {error}
exit_with_failures(main)
"""


def _run(error: str, failure: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {FAILURE_VARIABLE: str(failure)}
    command = [sys.executable, "-c", CHILD.format(error=error)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_parent_reads_the_error_that_ended_its_child(tmp_path: Path) -> None:
    failure = tmp_path / "failure.json"
    done = _run('DataError("row 7 has no prompt", fix="add one")', failure)
    assert done.returncode == DataError.exit_code
    assert "row 7 has no prompt" in done.stderr
    assert "Traceback" not in done.stderr
    error = read_failure(failure)
    assert isinstance(error, DataError)
    assert (error.message, error.fix) == ("row 7 has no prompt", "add one")


def test_other_exceptions_keep_their_traceback_and_leave_no_file(tmp_path: Path) -> None:
    failure = tmp_path / "failure.json"
    done = _run('KeyError("x")', failure)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert read_failure(failure) is None


class _UnlistedError(DataError):
    pass


@pytest.mark.parametrize(("error", "kind"), [(_UnlistedError("m"), DataError), (MilesError("m"), MilesError)])
def test_error_is_read_as_the_nearest_known_class(tmp_path: Path, error: MilesError, kind: type) -> None:
    write_failure(tmp_path / "failure.json", error)
    assert type(read_failure(tmp_path / "failure.json")) is kind
