"""Files of the journal on disk: `segment-000003-<xxh3>.h5` and `batch-000001-<xxh3>.h5` under `step-000041/`.

Owns their names, their checksums, and that each appears whole or not at all. Knows nothing of what is in them.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import xxhash

from miles.runs.claim import Fence
from miles.runs.files import disk_errors, sync_directory
from miles.runs.manifest import DamagedError

log = logging.getLogger(__name__)

Kind = Literal["segment", "batch"]

_FILE = re.compile(r"(segment|batch)-(\d{6,})-([0-9a-f]{32})\.h5(\.damaged)?")
_STEP = re.compile(r"step-(\d{6,})")
_UNREADABLE = (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENOENT)
"""What reading a file raises whose blocks are lost, or that was removed since its directory was listed."""


@dataclass(frozen=True, slots=True)
class JournalFile:
    """What a file's name says."""

    path: Path
    kind: Kind
    number: int
    """Files of one kind in one step are numbered from 1, the damaged ones too."""
    sum: str
    """XXH3 of the content, 128 bits in hexadecimal."""
    damaged: bool
    """Set aside."""


def step_directories(directory: Path) -> dict[int, Path]:
    """The journal's steps, ascending; none when there is no journal."""
    with disk_errors(directory, "read"):
        paths = list(directory.iterdir()) if directory.exists() else []
    found = {int(match[1]): path for path in paths if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def step_directory(directory: Path, step: int) -> Path:
    """Where the files of a step are."""
    return directory / f"step-{step:06d}"


def list_files(step: Path, kind: Kind) -> list[JournalFile]:
    """A step's files of one kind, by number, those set aside among them; none when the step has no directory."""
    with disk_errors(step, "read"):
        paths = list(step.iterdir()) if step.exists() else []
    matches = [(path, match) for path in paths if (match := _FILE.fullmatch(path.name)) and match[1] == kind]
    files = [JournalFile(path, cast(Kind, m[1]), int(m[2]), m[3], m[4] is not None) for path, m in matches]
    return sorted(files, key=lambda file: (file.number, file.path.name))


def newest_batch(step: Path) -> JournalFile | None:
    """The batch that counts: of the highest number. None when there is none or it is damaged.

    One of a lower number is a decision that was replaced, and nothing to fall back on.
    """
    batches = list_files(step, "batch")
    return batches[-1] if batches and not batches[-1].damaged else None


def write_file(step: Path, kind: Kind, number: int, data: bytes | memoryview, fence: Fence) -> JournalFile:
    """Put a file into a step's directory: there completely when this returns, or when the process is killed, not at
    all. Raises RunError when the disk refuses or a newer attempt drives the run.
    """
    digest = xxhash.xxh3_128_hexdigest(data)
    path = step / f"{kind}-{number:06d}-{digest}.h5"
    temporary = step / f".{path.name}.{os.getpid()}.tmp"
    with disk_errors(path):
        _make_directory(step)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fence.check()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(step)
    return JournalFile(path, kind, number, digest, damaged=False)


def _make_directory(path: Path) -> None:
    """Create a directory and its parents, each on the disk when this returns."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def read_file(file: JournalFile) -> bytes:
    """The content, verified. Raises DamagedError when it is not what was written, RunError when the disk refuses."""
    with disk_errors(file.path, "read"):
        try:
            data = file.path.read_bytes()
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            raise DamagedError(f"{file.path} cannot be read: {os.strerror(error.errno)}") from error
    if xxhash.xxh3_128_hexdigest(data) != file.sum:
        raise DamagedError(f"{file.path}: its {len(data)} bytes are not those that were written (checksum)")
    return data


def set_aside(file: JournalFile, why: DamagedError, fence: Fence) -> None:
    """Name what is wrong in the log and rename the file to `*.damaged`."""
    log.warning("%s; set aside", why)
    fence.check()
    with disk_errors(file.path):
        file.path.rename(file.path.with_name(file.path.name + ".damaged"))
        sync_directory(file.path.parent)


def remove_files(files: list[JournalFile]) -> None:
    """Remove files that are not needed any more; one that is gone already is fine."""
    for file in files:
        with disk_errors(file.path):
            file.path.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed attempts left: files half written, and the segments and older batches of decided steps."""
    for step in step_directories(directory).values():
        with disk_errors(step):
            for path in step.glob(".*.tmp"):
                path.unlink(missing_ok=True)
        if (batch := newest_batch(step)) is not None:
            remove_files(superseded(step, batch))


def superseded(step: Path, batch: JournalFile) -> list[JournalFile]:
    """What a step's batch replaces: its segments and earlier batches, but for those set aside."""
    files = [*list_files(step, "segment"), *list_files(step, "batch")]
    return [file for file in files if not file.damaged and file.path != batch.path]


def remove_step(step: Path) -> None:
    """Remove a step's directory with all that is in it."""
    with disk_errors(step):
        shutil.rmtree(step)


def move_steps(steps: list[Path], aside: Path, why: str) -> None:
    """Move step directories into a new directory, the last one first, and say there why."""
    with disk_errors(aside):
        _make_directory(aside)
        for step in reversed(steps):
            step.rename(aside / step.name)
        (aside / "why.txt").write_text(why + "\n")
        for changed in {aside, *(step.parent for step in steps)}:
            sync_directory(changed)
