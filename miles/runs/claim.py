"""The claim on a run: which process drives it. At most one does, without `flock`, on any shared file system.

After a node failed or was cut off, processes of the attempt before may still run there. The number of a claim is their
fence: they look for a newer one before they put anything into place.

A process of another node cannot be asked whether it lives, but of one in a Slurm job the job tells: a later run of the
same job, or anybody who knows that the job has ended, takes the run over.

Claims are numbered files, `claims/000001.json`, and the highest number counts. A claim is taken by hard-
linking a complete file to the next number, which exactly one process can do; it ends when its owner marks
it released or is no longer alive. Numbers never go down, so a claimant that was overtaken cannot undo the
newer claim.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from miles.errors import RunError
from miles.runs.files import disk_errors, sync_directory, write_atomic, write_new
from miles.runs.identity import ProcessIdentity
from miles.runs.paths import RunPaths

CLAIM_VARIABLE = "MILES_CLAIM"
"""Environment variable with the number of the claim that a process works under."""


class Overtaken(RunError):
    """Another attempt drives the run now; this one must change nothing any more."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who drives the run, since when."""

    identity: ProcessIdentity
    since: float
    """Unix time, in seconds."""
    job: int | None = None
    """The Slurm job in which it runs; None: in no job."""
    restart: int = 0
    """How often that job had been put back into the queue."""


class Claim:
    """The calling process's claim on a run. Use it in a `with` statement."""

    def __init__(self, path: Path, holder: Holder, previous: Holder | None) -> None:
        self.number = int(path.stem)
        """What the processes of this attempt are fenced by."""
        self._path = path
        self._holder = holder
        self.previous = previous
        """A holder that died without releasing the run; None: there was none."""

    @classmethod
    def acquire(
        cls, paths: RunPaths, *, job: int | None = None, restart: int = 0, live_jobs: Collection[int] | None = None
    ) -> Claim:
        """Claim the run for the calling process, which runs in the `restart`-th run of a Slurm job, or in none.

        `live_jobs`: the user's jobs that have not ended; None: not known. Raises RunError when somebody holds the run
        who is not known to have ended.
        """
        holder = Holder(ProcessIdentity.of(), time.time(), job, restart)
        with disk_errors(paths.claims):
            paths.claims.mkdir(exist_ok=True)
            temporary = paths.claims / f".{holder.identity.host}-{holder.identity.pid}-{time.time_ns()}.tmp"
            try:
                write_new(temporary, _text(holder, released=False))
                while True:
                    number, previous = _newest(paths)
                    if previous is not None and _holds(previous, holder, live_jobs):
                        raise _in_use(paths, number, previous)
                    path = _file(paths, number + 1)
                    try:
                        os.link(temporary, path)
                    except FileExistsError:
                        continue  # somebody else took this number: look again who it is
                    sync_directory(paths.claims)
                    return cls(path, holder, previous)
            finally:
                temporary.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the run back."""
        write_atomic(self._path, _text(self._holder, released=True))

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Fence:
    """Keeps a process from changing a run that a newer attempt drives.

    Asking and then renaming is not one operation: an attempt that is overtaken in between still completes that one
    rename. It is of a whole checkpoint or segment, which the newer attempt can use or replace.
    """

    def __init__(self, paths: RunPaths, number: int | None) -> None:
        """`number` of the claim that this process works under; None: it is not fenced."""
        self._paths = paths
        self._number = number
        self._holder = None if number is None else _holder(paths, number)

    @classmethod
    def from_environment(cls, paths: RunPaths) -> Fence:
        """As MILES_CLAIM says; without it the process is not fenced."""
        number = os.environ.get(CLAIM_VARIABLE)
        return cls(paths, int(number) if number else None)

    def check(self) -> None:
        """Raise Overtaken when a newer attempt drives the run, or somebody removed this one's claim to make way."""
        if self._number is None:
            return
        newest = _highest(self._paths)
        # The number of a claim that was removed by hand is given out again: the holder tells the two apart.
        if newest == self._number and _holder(self._paths, newest) == self._holder is not None:
            return
        name = self._paths.root.name
        raise Overtaken(
            f"a newer attempt drives run '{name}' (claim {newest}, this one's is {self._number}); this one ends",
            fix=f"nothing is lost; `miles watch {name}` shows the newer one",
        )


def current_holder(paths: RunPaths) -> Holder | None:
    """The live process that drives the run; None when nobody does."""
    _, holder = _newest(paths)
    return holder if holder is not None and holder.identity.alive() else None


def refuse_if_held(paths: RunPaths) -> None:
    """Raise RunError when a live process drives the run."""
    number, holder = _newest(paths)
    if holder is not None and holder.identity.alive():
        raise _in_use(paths, number, holder)


def refuse_any_held(runs: Sequence[RunPaths]) -> None:
    """Raise RunError when a live process drives one of the runs."""
    for paths in runs:
        refuse_if_held(paths)


def _holds(holder: Holder, claimant: Holder, live_jobs: Collection[int] | None) -> bool:
    """Whether somebody who has not released the run keeps it from a claimant."""
    if holder.job is not None:
        if live_jobs is not None and holder.job not in live_jobs:
            return False
        if claimant.job == holder.job and claimant.restart > holder.restart:
            return False
    return holder.identity.alive()


def _newest(paths: RunPaths) -> tuple[int, Holder | None]:
    """Highest claim number (0: none) and its holder; None when that claim is released."""
    number = _highest(paths)
    record = _record(paths, number)
    return number, None if record is None or record["released"] else _parse(record)


def _highest(paths: RunPaths) -> int:
    return max((int(path.stem) for path in paths.claims.glob("[0-9]*.json")), default=0)


def _holder(paths: RunPaths, number: int) -> Holder | None:
    """Who took a claim, even if it is released; None: there is no such claim."""
    record = _record(paths, number)
    return None if record is None else _parse(record)


def _record(paths: RunPaths, number: int) -> dict[str, Any] | None:
    file = _file(paths, number)
    with disk_errors(file, "read"):
        try:
            record: dict[str, Any] = json.loads(file.read_text())
        except FileNotFoundError:
            return None
    return record


def _parse(record: dict[str, Any]) -> Holder:
    return Holder(
        ProcessIdentity.parse(record["process"]), record["since"], record.get("job"), record.get("restart", 0)
    )


def _file(paths: RunPaths, number: int) -> Path:
    return paths.claims / f"{number:06d}.json"


def _text(holder: Holder, *, released: bool) -> str:
    record = {"process": holder.identity.record(), "since": holder.since, "released": released}
    if holder.job is not None:
        record |= {"job": holder.job, "restart": holder.restart}
    return json.dumps(record) + "\n"


def _in_use(paths: RunPaths, number: int, holder: Holder) -> RunError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    job = "" if holder.job is None else f" in job {holder.job}"
    who = f"process {holder.identity.pid} on {holder.identity.node or holder.identity.host}{job}, since {since}"
    name = paths.root.name
    if holder.identity.local:
        fix = f"`miles watch {name}` shows it, `miles stop {name}` ends it"
    elif holder.job is not None:
        fix = f"`miles watch {name}` shows it, `miles stop {name}` stops its job"
    else:
        fix = f"`miles stop {name}` on that host ends it; if that host is gone, remove {_file(paths, number)}"
    return RunError(f"run '{name}' is in use by {who}", fix=fix)
