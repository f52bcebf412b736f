"""A second Unix user of a cluster of the testbed, with an account that every system has: `nobody`.

Only root can act for somebody else, and the other must be able to read this checkout, its packages and a Python. A
Python that lies where it may not look (root's home) is copied for it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.run import REPOSITORY

from .user import User

NAME, ONLOOKER = "nobody", "daemon"
"""Who runs, and who looks from outside."""
PACKAGES = Path(sysconfig.get_path("purelib"))


def why_not() -> str:
    """Why nobody else can run anything here; empty: it can."""
    if os.getuid() != 0:
        return "only root can act for another user"
    unreadable = [place for place in (REPOSITORY / "miles", PACKAGES) if not reads(NAME, place)]
    return f"{NAME} cannot read {unreadable[0]}" if unreadable else ""


def reads(user: str, path: Path) -> bool:
    """Whether a user may read a file, or list a directory."""
    account = pwd.getpwnam(user)
    command = [shutil.which("head") or "head", "-c1", str(path)] if path.is_file() else ["/bin/ls", "-d", f"{path}/."]
    done = subprocess.run(
        command, user=account.pw_uid, group=account.pw_gid, extra_groups=[], cwd="/", capture_output=True, check=False
    )
    return done.returncode == 0


@dataclass(frozen=True)
class OtherUser(User):
    """Like `User`, as `nobody`; the directory becomes theirs."""

    python: str = field(default="", init=False)

    def __post_init__(self) -> None:
        account = pwd.getpwnam(NAME)
        os.chown(self.directory, account.pw_uid, account.pw_gid)
        python = Path(sys.executable).resolve()
        if not reads(NAME, python):
            python = _copy_python(self.directory.with_name(f"{self.directory.name}-python"))
        object.__setattr__(self, "python", str(python))

    @property
    def python_binds(self) -> list[str]:
        """What a container needs of this machine's for that Python and its packages."""
        directory = Path(self.python).parents[1]
        packages = next(directory.glob("lib/python*/site-packages"))
        return [f"{directory}:{directory}:ro", *([f"{PACKAGES}:{packages}:ro"] if packages != PACKAGES else [])]

    @property
    def environment(self) -> dict[str, str]:
        home = {"HOME": str(self.directory), "USER": NAME, "LOGNAME": NAME, "SHELL": "/bin/bash"}
        libraries = str(Path(self.python).parents[1] / "lib")
        python = {
            "PYTHONPATH": f"{REPOSITORY}:{PACKAGES}",
            "LD_LIBRARY_PATH": libraries,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return self.bed.environment | home | python | {"COLUMNS": "200"}

    def miles(self, *arguments: str, code: int = 0) -> str:
        account = pwd.getpwnam(NAME)
        done = subprocess.run(
            [self.python, "-m", "miles", *arguments],
            cwd=self.directory,
            env=self.environment,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            umask=0o022,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"miles {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def _copy_python(directory: Path) -> Path:
    """A copy of the running Python without its tests and packages, and its program."""
    base, version = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    (directory / "bin").mkdir(parents=True)
    program = shutil.copy2(base / "bin" / version, directory / "bin")
    left_out = shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "tkinter", "config-*", "*.a")
    shutil.copytree(base / "lib" / version, directory / "lib" / version, ignore=left_out)
    (directory / "lib" / version / "site-packages").mkdir()  # to mount the packages on
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(library, directory / "lib")
    return Path(program)
