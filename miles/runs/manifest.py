"""manifest.json of a checkpoint: what it is, and the size and checksum of every file in it.

Owns the manifest's format and how a file is compared with what the manifest says. Where checkpoints lie, and which one
counts, belongs to `miles.runs.checkpoints`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from miles.errors import RunError
from miles.runs.files import disk_errors

MANIFEST = "manifest.json"
SCHEMA = 1

_SEAL = "xxh3"
_BLOCK_BYTES = 4 * 2**20
_BROKEN = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""What reading a file raises whose blocks the disk or the file system cannot give back."""


class DamagedError(RunError):
    """A file of a run's state is missing or not what was written."""


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and checksum of a file."""

    size: int
    """Bytes."""
    xxh3: str
    """XXH3 of the content, 128 bits in hexadecimal."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint is."""

    stage: str
    step: int
    """Training steps that the state contains."""
    attempt: int
    created: float
    """Unix time, in seconds."""
    inputs: str
    """Fingerprint of the stage's inputs."""
    backend: str
    """The trainer that wrote it."""
    world_size: int
    """Ranks that wrote it."""
    save_seconds: float
    """From the beginning of the save until it was on disk."""
    stall_seconds: float
    """Of these, for how long training stood still."""
    metrics: dict[str, float]
    """Of the step; what is not finite is NaN."""
    trackers: dict[str, str]
    """Id of the run in each tracker."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint's description and its files, by their path in it with `/`."""

    info: CheckpointInfo
    files: dict[str, FileSum]


def encode(manifest: Manifest) -> bytes:
    """The file's bytes: canonical JSON that carries the checksum of its own body."""
    info = asdict(manifest.info)
    info["metrics"] = {name: value if math.isfinite(value) else None for name, value in info["metrics"].items()}
    files = {name: asdict(file) for name, file in manifest.files.items()}
    return _sealed({"schema": SCHEMA, "checkpoint": info, "files": files})


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DamagedError, and RunError when a newer Miles wrote it."""
    path = directory / MANIFEST
    try:
        with disk_errors(path, "read"):
            data = path.read_bytes()
    except RunError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOENT, errno.ENOTDIR, *_BROKEN):
            raise DamagedError(f"{path}: {_refusal(cause)}") from error
        raise
    body = _unsealed(data)
    if body is None:
        raise DamagedError(f"{path}: not what was written ({len(data)} bytes that do not fit its own checksum)")
    if body["schema"] > SCHEMA:
        raise RunError(
            f"{path} has format {body['schema']}; this Miles reads formats up to {SCHEMA}",
            fix="continue the run with the version of Miles that wrote it, or a newer one",
        )
    return _parse(body)


def sum_files(directory: Path, files: Iterable[str]) -> dict[str, FileSum]:
    """Flush files to the disk and hash them; keys are the paths as given, relative to `directory`.

    To be called where the files were written: a flush elsewhere says nothing about that node's cache. Raises RunError.
    """
    sums = {}
    for name in files:
        with disk_errors(directory / name):
            sums[name] = _sum(directory / name, flush=True)
    return sums


def file_damage(path: Path, expected: FileSum, *, contents: bool = True) -> str | None:
    """What is wrong with a file, without its name; None: nothing.

    `contents=False` looks at its size only. Raises RunError when the file cannot be judged (permission, stale handle).
    """
    try:
        with disk_errors(path, "read"):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return "not a file"
            if status.st_size < expected.size:
                return f"truncated, {status.st_size} of {expected.size} bytes"
            if status.st_size > expected.size:
                return f"{status.st_size} bytes instead of {expected.size}"
            found = _sum(path) if contents else expected
    except RunError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOENT, errno.ENOTDIR, *_BROKEN):
            return _refusal(cause)
        raise
    return None if found == expected else f"checksum {found.xxh3} instead of {expected.xxh3}"


def _refusal(error: OSError) -> str:
    assert error.errno is not None
    return "missing" if error.errno == errno.ENOENT else os.strerror(error.errno)


def _sum(path: Path, *, flush: bool = False) -> FileSum:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileSum(size, digest.hexdigest())


def _sealed(body: dict[str, Any]) -> bytes:
    return _canonical(body | {_SEAL: xxhash.xxh3_128_hexdigest(_canonical(body))})


def _unsealed(data: bytes) -> dict[str, Any] | None:
    """The body of sealed JSON; None when any byte is not as it was written.

    The same for every version of the format, so that damage is told from a newer version.
    """
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or body.pop(_SEAL, None) is None or _sealed(body) != data:
            return None
    except ValueError:
        return None
    return body


def _canonical(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _parse(body: dict[str, Any]) -> Manifest:
    info = body["checkpoint"]
    metrics = {name: math.nan if value is None else value for name, value in info["metrics"].items()}
    return Manifest(
        info=CheckpointInfo(**info | {"metrics": metrics}),
        files={name: FileSum(**file) for name, file in body["files"].items()},
    )
