"""The claim on a run: which process drives it. At most one does, without `flock`, on any shared file system.

Claims are numbered files, `claims/000001.json`, and the highest number counts. A claim is taken by hard-
linking a complete file to the next number, which exactly one process can do; it ends when its owner marks
it released or is no longer alive. Numbers never go down, so a claimant that was overtaken cannot undo the
newer claim.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from miles.errors import RunError
from miles.runs.files import disk_errors, sync_directory, write_atomic, write_new
from miles.runs.identity import ProcessIdentity
from miles.runs.paths import RunPaths


@dataclass(frozen=True, slots=True)
class Holder:
    """Who drives the run, since when."""

    identity: ProcessIdentity
    since: float
    """Unix time, in seconds."""


class Claim:
    """The calling process's claim on a run. Use it in a `with` statement."""

    def __init__(self, path: Path, holder: Holder, previous: Holder | None) -> None:
        self._path = path
        self._holder = holder
        self.previous = previous
        """A holder that died without releasing the run; None: there was none."""

    @classmethod
    def acquire(cls, paths: RunPaths) -> Claim:
        """Claim the run for the calling process. Raises RunError when a live process holds it."""
        holder = Holder(ProcessIdentity.of(), time.time())
        with disk_errors(paths.claims):
            paths.claims.mkdir(exist_ok=True)
            temporary = paths.claims / f".{holder.identity.host}-{holder.identity.pid}-{time.time_ns()}.tmp"
            try:
                write_new(temporary, _text(holder, released=False))
                while True:
                    number, previous = _newest(paths)
                    if previous is not None and previous.identity.alive():
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


def current_holder(paths: RunPaths) -> Holder | None:
    """The live process that drives the run; None when nobody does."""
    _, holder = _newest(paths)
    return holder if holder is not None and holder.identity.alive() else None


def refuse_if_held(paths: RunPaths) -> None:
    """Raise RunError when a live process drives the run."""
    number, holder = _newest(paths)
    if holder is not None and holder.identity.alive():
        raise _in_use(paths, number, holder)


def _newest(paths: RunPaths) -> tuple[int, Holder | None]:
    """Highest claim number (0: none) and its holder; None when that claim is released."""
    numbers = [int(path.stem) for path in paths.claims.glob("[0-9]*.json")]
    if not numbers:
        return 0, None
    record = json.loads(_file(paths, max(numbers)).read_text())
    holder = Holder(ProcessIdentity.parse(record["process"]), record["since"])
    return max(numbers), None if record["released"] else holder


def _file(paths: RunPaths, number: int) -> Path:
    return paths.claims / f"{number:06d}.json"


def _text(holder: Holder, *, released: bool) -> str:
    record = {"process": holder.identity.record(), "since": holder.since, "released": released}
    return json.dumps(record) + "\n"


def _in_use(paths: RunPaths, number: int, holder: Holder) -> RunError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    who = f"process {holder.identity.pid} on {holder.identity.host}, since {since}"
    name = paths.root.name
    if holder.identity.local:
        fix = f"`miles watch {name}` shows it, `miles stop {name}` ends it"
    else:
        fix = f"`miles stop {name}` on that host ends it; if that host is gone, remove {_file(paths, number)}"
    return RunError(f"run '{name}' is in use by {who}", fix=fix)
