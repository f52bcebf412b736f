"""Files of a run on disk: whole files replaced atomically, JSON lines appended, a torn last line tolerated.

Owns how bytes get to the disk and how the operating system's refusals become a `RunError`. Knows no file of
the run by name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from miles.errors import RunError

ABANDONED_SECONDS = 600.0
"""A temporary file exists for as long as one write takes; one this old has lost its process."""

FULL_BYTES = 64 * 2**10
"""A disk with less free space counts as full: less than a line of metrics and a few blocks."""

_WHERE = "or use another directory (runs_dir)"
_MISPLACED = "a file stands where a directory belongs: move it, " + _WHERE
_CLOSED = "make it writable, " + _WHERE
_FIXES = {
    errno.ENOSPC: "free some space there, or use a directory on another disk (runs_dir)",
    errno.EDQUOT: "your quota there is used up: remove files of yours, ask the site for more, or use a directory on "
    "another disk (runs_dir)",
    errno.EIO: "the disk or its server failed: the system's log says how (`dmesg`); when it works again, the same "
    "command continues the run",
    errno.ESTALE: "its server took the directory away (mounted anew, moved or removed elsewhere): when it is back on "
    "this node, the same command continues the run",
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.ENOTDIR: _MISPLACED,
    errno.EEXIST: _MISPLACED,
}


@contextlib.contextmanager
def disk_errors(path: Path, doing: Literal["write", "read"] = "write") -> Iterator[None]:
    """Turn the disk's refusals (full, quota, failed, stale, read-only, no permission, no directory) into a RunError
    that names the file.
    """
    try:
        yield
    except OSError as error:
        missing = (
            f"create the directory {path.parent}" if doing == "write" else "bring it back: nothing of Miles removes it"
        )
        fixes = _FIXES | {errno.ENOENT: missing}
        if error.errno not in fixes:
            raise
        message = f"cannot {doing} {path}: {os.strerror(error.errno)}"
        raise RunError(message, fix=fixes[error.errno]) from error


def full_disk(directory: Path) -> RunError | None:
    """The error of a disk without space, which explains why a process could not even say what ended it."""
    free = shutil.disk_usage(directory).free
    if free >= FULL_BYTES:
        return None
    return RunError(
        f"the disk of {directory} is full: {free / 2**10:.0f} KiB are free",
        fix="free some space there; the same command continues the run",
    )


def write_atomic(path: Path, text: str, *, mode: int = 0o644, durable: bool = True) -> None:
    """Write a whole file so that readers, and a crash at any instant, see the old content or the new one.

    `durable=False` skips the flush to the disk: for files that are rewritten often and restored by nobody.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        # A killed process of the same number may have left one: numbers come again, in containers soon.
        temporary.unlink(missing_ok=True)
        try:
            write_new(temporary, text, mode=mode, durable=durable)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            sync_directory(path.parent)


def write_new(path: Path, text: str, *, mode: int = 0o644, durable: bool = True) -> None:
    """Create a file that must not exist yet. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def remove_abandoned(directory: Path) -> None:
    """Remove the temporary files that killed processes left in a directory and below; fresh ones may be in use."""
    for path in directory.rglob(".*.tmp"):
        with contextlib.suppress(OSError):  # whoever removed it first, or a disk that keeps it: it costs nothing
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def sync_directory(path: Path) -> None:
    """Flush a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Flush every file of a directory and below, and the directories themselves: then a rename makes it durable."""
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(parent))


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line in a single write and flush it, cutting off a torn line that a crash left at the end."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    with disk_errors(path), path.open("ab+") as file:
        _cut_torn_line(file.fileno())
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(descriptor: int, block: int = 65536) -> None:
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    end = size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            os.ftruncate(descriptor, start + newline + 1)
            return
        end = start
    os.ftruncate(descriptor, 0)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON lines file; a last one without its newline is being written and left out.

    A missing file has no lines. Raises RunError for a damaged line that is not the last.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RunError(
                f"{path}, line {number}: not JSON ({error})",
                fix="remove that line: nothing of Miles wrote it",
            ) from error
    return records
