"""Reading the logs of a run's processes: the ends of them, or as they grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from miles.errors import RunError, did_you_mean
from miles.runs.paths import RunPaths

ROLES = ("driver", "engine", "trainer", "step")
_POLL_SECONDS = 0.5
_TAIL_BYTES_PER_LINE = 1000


def log_files(paths: RunPaths, attempt: int | None, role: str | None) -> list[Path]:
    """The logs of an attempt (None: the newest) of the processes of a role (None: of all but the driver).

    The newest attempt of a role is the newest that had such processes: the report step has no trainer.

    Raises RunError for an unknown role and for an attempt that there was not.
    """
    if role is not None and role not in ROLES:
        raise RunError(f"there is no role '{role}'." + did_you_mean(role, ROLES), fix=f"roles are: {', '.join(ROLES)}")
    if role == "driver":
        return [paths.driver_log] if paths.driver_log.exists() else []
    numbers = sorted(int(path.name.removeprefix("attempt-")) for path in paths.all_logs.glob("attempt-*"))
    if attempt is None and role is None:
        return sorted(paths.latest_logs.resolve().glob("*.log"))
    if attempt is None:
        found = (sorted(paths.logs(number).glob(f"{role}-*.log")) for number in reversed(numbers))
        return next(filter(None, found), [])
    if attempt not in numbers:
        had = f"it had attempts 1 to {numbers[-1]}" if numbers else "it has not started yet"
        raise RunError(f"run '{paths.root.name}' has no attempt {attempt}", fix=had)
    return sorted(paths.logs(attempt).glob(f"{role or '*'}-*.log"))


def log_tails(paths: RunPaths, attempt: int | None, role: str | None, lines: int) -> Iterator[str]:
    """The last lines of each log, with a heading that names the file."""
    for file in log_files(paths, attempt, role):
        yield _heading(file)
        yield _tail(file, lines)


def follow_logs(
    paths: RunPaths,
    attempt: int | None,
    role: str | None,
    lines: int,
    write: Callable[[str], None],
    *,
    running: Callable[[], bool],
) -> None:
    """Write the logs' last lines, then what is added, until `running()` is false.

    Without an attempt number, later attempts are followed as they begin.
    """
    positions: dict[Path, int] = {}
    shown: Path | None = None
    while True:
        more = running()
        for file in log_files(paths, attempt, role):
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
    size = file.stat().st_size
    text = _between(file, max(0, size - lines * _TAIL_BYTES_PER_LINE), size)
    return "\n".join(text.splitlines()[-lines:])


def _between(file: Path, start: int, end: int) -> str:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(end - start).decode(errors="replace").removesuffix("\n")
