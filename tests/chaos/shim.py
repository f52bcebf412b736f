"""The disk shim: compiling it, arming it for processes that run under it, and reading what it counted.

What it does is said at the top of disk_shim.c, and this module owns the control file that it maps.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("disk_shim.c")
KILL, TORN = -1, -2
ALWAYS = 2**62
"""A change that never comes: the last one that fails when all do."""

_NUMBERS, _BELOW, _PART = struct.Struct("5q"), 1024, 256


@dataclass(frozen=True, slots=True)
class Change:
    """A change to a file: its number from 1, who made it, what it was."""

    number: int
    pid: int
    name: str
    path: Path

    def __str__(self) -> str:
        return f"{self.name} {self.path.name}"


class Shim:
    """The compiled shim over one directory. `work` (outside of it) gets the library, the control file and the log."""

    def __init__(self, work: Path, below: Path) -> None:
        compiler = shutil.which("cc")
        assert compiler, "the proofs need a C compiler: apt-get install gcc libc6-dev"
        work.mkdir(parents=True, exist_ok=True)
        self._library, self._file, self._log = work / "disk_shim.so", work / "control", work / "control.log"
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-Wall", "-o", self._library, SOURCE, "-ldl"], check=True)
        self._file.write_bytes(bytes(_NUMBERS.size) + str(below).encode().ljust(_BELOW, b"\0") + bytes(_PART))
        with self._file.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), 0)

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that run under the shim, beside their own."""
        return {"LD_PRELOAD": str(self._library), "DISK_SHIM": str(self._file)}

    def arm(self, first: int = 0, last: int | None = None, *, action: int = KILL, part: str = "") -> None:
        """Count from 0 again; the changes from `first` (0: none) to `last` (not given: that one) meet `action`.

        `action` is KILL, TORN or an errno. With `part`, only changes to paths that contain it count.
        """
        self._log.unlink(missing_ok=True)
        self._control[: _NUMBERS.size] = bytes(_NUMBERS.size)
        self._control[_NUMBERS.size + _BELOW :] = part.encode().ljust(_PART, b"\0")
        self._control[: _NUMBERS.size] = _NUMBERS.pack(0, first, first if last is None else last, action, 1)

    def count(self) -> int:
        """Changes since it was armed."""
        return _NUMBERS.unpack(self._control[: _NUMBERS.size])[0]

    def changes(self) -> list[Change]:
        """The changes since it was armed, by number."""
        rows = (line.split(" ", 3) for line in self._log.read_text().splitlines()) if self._log.exists() else ()
        found = [Change(int(number), int(pid), name, Path(path)) for number, pid, name, path in rows]
        return sorted(found, key=lambda change: change.number)
