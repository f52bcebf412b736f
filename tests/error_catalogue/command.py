"""The `miles` command as a user runs it, and the panel that it ends with.

`run_all` runs many commands from one interpreter, forked for each: the same entry point, arguments, streams and exit
code as the console script, without its start-up. All of them must be commands that fail before they do anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from miles.cli.main import main

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "COLUMNS": "4000",
    "OMP_NUM_THREADS": "1",
    "PATH": str(Path(sys.executable).parent),
}
"""So wide that no panel wraps a line; and without any program but Python's, so that there is no Slurm."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended."""

    code: int
    output: str
    errors: str

    @property
    def panel(self) -> str:
        """The text of the one panel on stderr, white space reduced to single blanks."""
        lines = self.errors.strip().splitlines()
        assert len(lines) >= 3, self
        assert lines[0].startswith("╭─ ") and lines[-1].startswith("╰─"), self.errors
        assert all(line.startswith("│ ") for line in lines[1:-1]), self.errors
        assert "Traceback" not in self.errors
        return flat(" ".join(line.strip("│") for line in lines[1:-1]))


def flat(text: str) -> str:
    """Text with all white space reduced to single blanks."""
    return " ".join(text.split())


def start(*arguments: str, directory: Path) -> subprocess.Popen[str]:
    """Start `miles ARGUMENTS` in a directory."""
    return subprocess.Popen(
        [sys.executable, "-m", "miles", *arguments],
        cwd=directory,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    """Wait for a command."""
    output, errors = process.communicate(timeout=240)
    return Ended(process.returncode, output, errors)


def miles(*arguments: str, directory: Path) -> Ended:
    """Run `miles ARGUMENTS` in a directory."""
    return ended(start(*arguments, directory=directory))


def run_all(commands: Sequence[tuple[Path, Sequence[str]]]) -> list[Ended]:
    """Run each command in its directory, one after another."""
    with tempfile.TemporaryDirectory() as results:
        request = json.dumps([[str(directory), *arguments] for directory, arguments in commands])
        command = [sys.executable, "-m", "tests.error_catalogue.command", results]
        done = subprocess.run(command, input=request, text=True, env=ENVIRONMENT, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        codes = json.loads(done.stdout)
        return [
            Ended(code, (Path(results) / f"{number}.out").read_text(), (Path(results) / f"{number}.err").read_text())
            for number, code in enumerate(codes)
        ]


def _run_here(directory: str, arguments: list[str]) -> NoReturn:
    os.chdir(directory)
    sys.argv = ["miles", *arguments]
    main()


def _run_forked(results: Path, number: int, directory: str, arguments: list[str]) -> int:
    pid = os.fork()
    if pid != 0:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for descriptor, suffix in ((1, "out"), (2, "err")):
        file = os.open(results / f"{number}.{suffix}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    _run_here(directory, arguments)


def _run_requests(results: Path, requests: list[list[str]]) -> list[int]:
    """The exit codes; the first is run here as well, so that its imports are there in every fork."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        _run_here(requests[0][0], requests[0][1:])
    return [
        _run_forked(results, number, directory, arguments) for number, (directory, *arguments) in enumerate(requests)
    ]


if __name__ == "__main__":
    print(json.dumps(_run_requests(Path(sys.argv[1]), json.load(sys.stdin))))
