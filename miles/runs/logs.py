"""Reading the logs of a run's processes: the ends of them, or as they grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from miles.errors import RunError, did_you_mean
from miles.runs.paths import RunPaths

ROLES = ("driver", "job", "engine", "trainer", "step")
_POLL_SECONDS = 0.5
_TAIL_BYTES_PER_LINE = 1000


@dataclass(frozen=True, slots=True)
class Choice:
    """Which logs are meant."""

    attempt: int | None = None
    """None: the newest, of a role the newest that had such processes: the report step has no trainer."""
    role: str | None = None
    """None: all but the driver and the jobs."""
    node: str | None = None
    """Name of a node; None: all."""


def log_files(paths: RunPaths, choice: Choice) -> list[Path]:
    """The logs that are meant; of the role `job` the output of the newest job of the cluster.

    Raises RunError for an unknown role, and for an attempt or a node that there was not.
    """
    role, attempt = choice.role, choice.attempt
    if role is not None and role not in ROLES:
        raise RunError(f"there is no role '{role}'." + did_you_mean(role, ROLES), fix=f"roles are: {', '.join(ROLES)}")
    if role == "driver":
        return [paths.driver_log] if paths.driver_log.exists() else []
    if role == "job":
        return sorted(paths.all_logs.glob("slurm-*.out"), key=lambda file: file.stat().st_mtime)[-1:]
    numbers = sorted(int(path.name.removeprefix("attempt-")) for path in paths.all_logs.glob("attempt-*"))
    if attempt is not None and attempt not in numbers:
        had = f"it had attempts 1 to {numbers[-1]}" if numbers else "it has not started yet"
        raise RunError(f"run '{paths.root.name}' has no attempt {attempt}", fix=had)
    searched = [attempt] if attempt is not None else numbers[-1:] if role is None else reversed(numbers)
    found = next(filter(None, (sorted(paths.logs(number).glob(f"{role or '*'}-*.log")) for number in searched)), [])
    return found if choice.node is None else _of_node(found, choice.node)


def _of_node(files: list[Path], node: str) -> list[Path]:
    """Logs are called ROLE-NODE-INDEX.log; a node's name may hold hyphens itself."""
    nodes = sorted({file.stem.partition("-")[2].rpartition("-")[0] for file in files})
    if node not in nodes:
        had = f"those logs are of: {', '.join(nodes)}" if nodes else "it has no such logs yet"
        raise RunError(f"there is no log of a node '{node}'." + did_you_mean(node, nodes), fix=had)
    return [file for file in files if file.stem.partition("-")[2].rpartition("-")[0] == node]


def log_tails(paths: RunPaths, choice: Choice, lines: int) -> Iterator[str]:
    """The last lines of each log, with a heading that names the file."""
    for file in log_files(paths, choice):
        yield _heading(file)
        yield _tail(file, lines)


def follow_logs(
    paths: RunPaths, choice: Choice, lines: int, write: Callable[[str], None], *, running: Callable[[], bool]
) -> None:
    """Write the logs' last lines, then what is added, until `running()` is false.

    Without an attempt number, later attempts are followed as they begin.
    """
    positions: dict[Path, int] = {}
    shown: Path | None = None
    while True:
        more = running()
        for file in log_files(paths, choice):
            size = file.stat().st_size
            if file not in positions:
                write(_heading(file))
                write(_tail(file, lines))
            elif size > positions[file]:
                if shown != file:
                    write(_heading(file))
                write(_between(file, positions[file], size))
            else:
                continue
            positions[file], shown = size, file
        if not more:
            return
        time.sleep(_POLL_SECONDS)


def _heading(file: Path) -> str:
    return f"==> {file} <=="


def _tail(file: Path, lines: int) -> str:
    """The last lines of a log."""
    size = file.stat().st_size
    text = _between(file, max(0, size - lines * _TAIL_BYTES_PER_LINE), size)
    return "\n".join(text.splitlines()[-lines:])


def _between(file: Path, start: int, end: int) -> str:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(end - start).decode(errors="replace").removesuffix("\n")
