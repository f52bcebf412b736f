"""Accounting for a cluster of the testbed: MariaDB and slurmdbd, so that `sacct` answers.

Owns these two daemons and their configuration. Needs the packages `slurmdbd mariadb-server-core mariadb-client-core`;
a first start takes 5 to 10 s, most of them for the tables of the database.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .daemons import START_SECONDS, Daemons, until

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")
PACKAGES = "slurmdbd mariadb-server-core mariadb-client-core"
LOOPBACK = "127.0.0.1"
_DATABASE = "slurm_acct"
_INITIALIZE = f"""
create database if not exists {_DATABASE};
create user if not exists slurm@'{LOOPBACK}' identified by 'slurm';
grant all on {_DATABASE}.* to slurm@'{LOOPBACK}';
"""


def accounting_installed(path: str) -> bool:
    """Whether the programs are on this machine; `path`: where to look."""
    return all(shutil.which(program, path=path) for program in PROGRAMS)


@dataclass(frozen=True)
class Accounting:
    """Accounting of the cluster in a directory; `port`: of slurmdbd, the database has the one above."""

    directory: Path
    port: int
    daemons: Daemons

    def slurm_conf(self) -> dict[str, object]:
        """What `slurm.conf` says about it."""
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "localhost",
            "AccountingStoragePort": self.port,
            "AccountingStoragePass": self.directory / "run/munge.sock",
        }

    def start(self) -> None:
        """Start what does not run; munged must. Raises RuntimeError."""
        if self.daemons.pid("mariadbd") is None:
            self._start_database()
        if self.daemons.pid("slurmdbd") is None:
            self._write_configuration()
            self.daemons.start("slurmdbd", "slurmdbd")
            if not until(lambda: self._run("sacctmgr", "-n", "list", "cluster"), START_SECONDS):
                raise RuntimeError("slurmdbd does not answer")
            self._run("sacctmgr", "-i", "-Q", "add", "cluster", "testbed")

    def end(self) -> None:
        self.daemons.end("slurmdbd")
        self.daemons.end("mariadbd")

    def _start_database(self) -> None:
        base, data = self.directory, self.directory / "mysql"
        user = ["--user=root"] if os.getuid() == 0 else []
        if not (data / "mysql").is_dir():
            made = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db", *user]
            if not self._run(*made, "--auth-root-authentication-method=normal"):
                raise RuntimeError(f"{made[0]} failed")
        files = [f"--datadir={data}", f"--socket={self._socket}", f"--pid-file={base}/run/mariadbd.pid"]
        files += [f"--bind-address={LOOPBACK}", f"--port={self.port + 1}", "--skip-name-resolve", *user]
        files += ["--innodb-lock-wait-timeout=900", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0"]
        self.daemons.start("mariadbd", "mariadbd", "--no-defaults", *files, detaches=False)
        client = ["mariadb", "--no-defaults", f"--socket={self._socket}", "--user=root", "-e", _INITIALIZE]
        if not until(lambda: self._run(*client), START_SECONDS):
            raise RuntimeError("the database does not answer")

    @property
    def _socket(self) -> Path:
        return self.directory / "run" / "mysql.sock"

    def _write_configuration(self) -> None:
        base = self.directory
        settings: dict[str, object] = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={base}/run/munge.sock",
            "DbdHost": "localhost",
            "DbdAddr": LOOPBACK,
            "DbdPort": self.port,
            "SlurmUser": pwd.getpwuid(os.getuid()).pw_name,
            "LogFile": base / "log/slurmdbd.log",
            "PidFile": base / "run/slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": LOOPBACK,
            "StoragePort": self.port + 1,
            "StorageUser": "slurm",
            "StoragePass": "slurm",
            "StorageLoc": _DATABASE,
            "CommitDelay": 1,
        }
        file = base / "etc" / "slurmdbd.conf"
        file.touch(mode=0o600)  # it refuses one that others can read
        file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def _run(self, *command: str) -> bool:
        """Whether a command succeeds; what it says goes into a log."""
        with (self.directory / "log" / f"{command[0]}.log").open("ab") as log:
            done = subprocess.run(
                command,
                env=self.daemons.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=START_SECONDS,
                check=False,
            )
        return done.returncode == 0
