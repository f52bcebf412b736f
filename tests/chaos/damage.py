"""Files that are not what was written, and the files of a run's state that a continuing command needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from miles.runs.paths import RunPaths


def truncated(file: Path) -> None:
    """Half of it is there."""
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def flipped(file: Path) -> None:
    """One bit in the middle is another."""
    middle = file.stat().st_size // 2
    with file.open("r+b") as stream:
        stream.seek(middle)
        (byte,) = stream.read(1)
        stream.seek(middle)
        stream.write(bytes([byte ^ 0x10]))


def emptied(file: Path) -> None:
    """A name without content, as a power cut leaves it where nothing was flushed."""
    file.write_bytes(b"")


def removed(file: Path) -> None:
    """Not there."""
    file.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "bit flipped": flipped,
    "emptied": emptied,
    "removed": removed,
}


def needed_files(paths: RunPaths, stage: str) -> list[Path]:
    """What a continuing command reads: the newest checkpoint, and the journal after it."""
    newest = max(paths.checkpoints(stage).glob("step-*"))
    later = [step for step in sorted(paths.journal(stage).glob("step-*")) if step.name > newest.name]
    return [file for directory in (newest, *later) for file in sorted(directory.rglob("*")) if file.is_file()]
