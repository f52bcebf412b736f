"""Files that are not what was written, and the files of a run's state that a continuing command needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from miles.runs.paths import RunPaths
from tests.chaos.rehearsal import Rehearsal


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
    """What a continuing command reads: the newest checkpoint and the journal after it. Relative to the run.

    Without the temporary file of the write at which the run was killed: nothing reads that.
    """
    newest = max(paths.checkpoints(stage).glob("step-*"))
    later = [step for step in sorted(paths.journal(stage).glob("step-*")) if step.name > newest.name]
    files = [
        file
        for directory in (newest, *later)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.suffix != ".tmp"
    ]
    return [file.relative_to(paths.root) for file in files]


@dataclass(frozen=True, slots=True)
class Survival:
    """A stage that continued with one damaged file, and what was wrong afterwards."""

    file: str
    damage: str
    findings: list[str]


def survive(stage: Rehearsal, midway: RunPaths, file: Path, damage: str) -> Survival:
    """Go back to midway, damage a file (relative to the run directory), run the stage to its end, and compare.

    A file of the journal that was removed is not missed by name: its responses are generated again.
    """
    stage.begin(midway)
    DAMAGES[damage](stage.paths.root / file)
    findings = []
    if code := stage.run():
        findings.append(f"exit code {code}\n{stage.message()}")
    else:
        findings += stage.findings()
        named = str(Path(*file.parts[3:]))  # as in its checkpoint, or in its step of the journal
        if named not in stage.message() and not (damage == "removed" and file.suffix == ".h5"):
            findings.append(f"the log does not name {file}\n{stage.message()}")
    return Survival(str(file), damage, findings)
