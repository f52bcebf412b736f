"""Checks of `miles doctor` on the directory of the runs: what the file system promises, its room, quota and clock.

Every promise is tried, in a directory of its own below the given one, which is removed again. Whether every node sees
the same is tried by each job when it starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from miles.cluster.checks import Check, Status
from miles.errors import RunError
from miles.runs.files import sync_directory, write_atomic, write_new

ELSEWHERE = "keep runs on another file system"
LOW_BYTES, TOO_FEW_BYTES = 100 * 2**30, 2**30
LOW_FILES = 10_000
CLOCK_SECONDS = 2.0
SLOW_FSYNC_SECONDS = 1.0
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "orangefs", "pvfs2", "fuse.glusterfs", "9p")
MEMORY = ("tmpfs", "ramfs")
_QUOTA_SECONDS = 20.0


def disk_checks(directory: Path) -> Iterator[Check]:
    """Checks of the directory, or of the nearest parent that exists."""
    place = directory.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".miles-doctor-", dir=place) as trial:
            yield _file_system(place)
            tried: list[tuple[str, Callable[[Path], Check]]] = [
                ("atomic-rename", _atomic_rename),
                ("exclusive-create", _exclusive_create),
                ("fsync", _fsync),
                ("clock", _clock),
            ]
            for name, check in tried:
                try:
                    yield check(Path(trial))
                except (OSError, RunError) as error:
                    yield Check(name, Status.FAIL, f"{place}: {error}", ELSEWHERE)
    except OSError as error:
        message = f"cannot write to {place}: {error.strerror}"
        yield Check("directory", Status.FAIL, message, "`miles doctor DIR` looks at another directory")
        return
    yield room(place, shutil.disk_usage(place).free, os.statvfs(place))
    yield quota()


def file_system(place: Path, mounts: str) -> tuple[str, str]:
    """Mount point and type of the file system of a directory, from the text of /proc/mounts."""
    best = ("/", "unknown")
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = words[1].replace("\\040", " ")
        # The last of several mounts on one point is the one that is seen.
        if place.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, words[2])
    return best


def _file_system(place: Path) -> Check:
    try:
        point, kind = file_system(place.resolve(), Path("/proc/mounts").read_text())
    except OSError as error:
        return Check("directory", Status.SKIP, f"{place} is writable; /proc/mounts is not readable: {error.strerror}")
    told = f"{place} is writable, on {kind} ({point})"
    if kind in MEMORY:
        return Check("directory", Status.WARN, f"{told}: gone after a restart", "keep runs on a disk")
    if kind.startswith(SHARED):
        return Check("directory", Status.OK, f"{told}, a shared file system")
    return Check("directory", Status.OK, f"{told}; jobs of several nodes need one that all of them see")


def _atomic_rename(trial: Path) -> Check:
    target = trial / "rename"
    for text in ("old", "new"):
        write_atomic(target, text)
    if target.read_text() != "new" or len(list(trial.iterdir())) != 1:
        return Check("atomic-rename", Status.FAIL, "a rename did not replace the file", ELSEWHERE)
    return Check("atomic-rename", Status.OK, "a rename replaces a file as a whole")


def _exclusive_create(trial: Path) -> Check:
    write_new(trial / "claim", "first")
    os.link(trial / "claim", trial / "link")
    for twice in (lambda: write_new(trial / "claim", "second"), lambda: os.link(trial / "claim", trial / "link")):
        try:
            twice()
        except FileExistsError:
            continue
        message = "a file that must not exist was made twice: two processes could drive one run"
        return Check("exclusive-create", Status.FAIL, message, ELSEWHERE)
    return Check("exclusive-create", Status.OK, "a file or link is made by one process only")


def _fsync(trial: Path) -> Check:
    begin = time.monotonic()
    for number in range(5):
        write_new(trial / f"flushed-{number}", "x" * 4096)
        sync_directory(trial)
    seconds = (time.monotonic() - begin) / 5
    told = f"a small file is on the disk after {seconds * 1000:.1f} ms"
    if seconds > SLOW_FSYNC_SECONDS:
        return Check("fsync", Status.WARN, f"{told}: every save and flush waits for that", "a faster file system")
    return Check("fsync", Status.OK, told)


def _clock(trial: Path) -> Check:
    """The clock of this host against that of the file system, which every node sees."""
    before = time.time()
    write_new(trial / "clock", "")
    return clock((trial / "clock").stat().st_mtime, before, time.time())


def clock(written: float, before: float, after: float) -> Check:
    """A file was written between `before` and `after` by our clock, and says `written`."""
    apart = max(before - written, written - after, 0.0)
    if apart > CLOCK_SECONDS:
        message = f"this host and the file system disagree by {apart:.0f} s about the time"
        return Check("clock", Status.WARN, message, "have its operators synchronize the clocks (chrony, ntp)")
    return Check("clock", Status.OK, f"this host and the file system agree within {CLOCK_SECONDS:g} s")


def room(place: Path, free: int, inodes: os.statvfs_result) -> Check:
    """Free space, and files that may still be made."""
    told = f"{free / 2**30:.0f} GiB are free in {place}"
    remedy = "free space there, or keep runs elsewhere; a checkpoint holds 12 to 16 bytes per parameter"
    if inodes.f_files and inodes.f_favail < LOW_FILES:
        message = f"{told}, and room for {inodes.f_favail} more files"
        return Check("free-space", Status.WARN, message, "remove small files")
    if free < TOO_FEW_BYTES:
        return Check("free-space", Status.FAIL, f"{free / 2**20:.0f} MiB are free in {place}", remedy)
    return Check("free-space", Status.WARN, told, remedy) if free < LOW_BYTES else Check("free-space", Status.OK, told)


def quota() -> Check:
    """What `quota` says about this user; file systems with tools of their own (lfs quota, mmlsquota) are not asked."""
    if not shutil.which("quota"):
        return Check("quota", Status.SKIP, "no program `quota` here; the site's own may tell (lfs quota, mmlsquota)")
    command = ["quota", "-w", "-s"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUOTA_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("quota", Status.SKIP, f"`quota` does not answer: {error}")
    return read_quota(done.stdout)


def read_quota(text: str) -> Check:
    """The check in what `quota -w -s` prints: a star after a number says that it is over its limit."""
    lines = [line.split() for line in text.splitlines() if line.startswith(("/", " ")) and len(line.split()) >= 4]
    rows = [words for words in lines if words[0] != "Filesystem"]
    if not rows:
        return Check("quota", Status.OK, "`quota` knows no limit for you")
    told = "; ".join(f"{words[0]}: {words[1]} of {words[3]}" for words in rows)
    if any("*" in word for words in rows for word in words[1:]):
        return Check("quota", Status.FAIL, f"a quota is used up: {told}", "free space, or ask for a larger quota")
    return Check("quota", Status.OK, told)
