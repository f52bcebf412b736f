"""A real Slurm cluster on this host, for tests: munged, slurmctld and several slurmd, in a directory of their own.

In a test: take the fixture `slurm` (conftest.py); it is an idle `Testbed`, and `SLURM_CONF` and `MUNGE_SOCKET` are set
in the environment of the test, so that `sbatch` and Miles' commands simply work:

    def test_it(slurm, tmp_path):
        job = slurm.sbatch("#!/bin/bash\nsleep 60\n", "-N2", "--exclusive", "--requeue", "-o", tmp_path / "out")
        slurm.wait_state(job, "RUNNING")
        slurm.preempt(job)                              # a job of partition high takes its nodes for a second
        slurm.wait_state(job, "RUNNING", restarts=1)

`slurm_clusters(send_user_signal=True)` gives a cluster with other settings, started once per session. By hand:

    eval "$(python -m tests.slurm.testbed up DIR [--nodes 4] [--grace 3] [--send-user-signal])"
    python -m tests.slurm.testbed kill-node DIR n2      (start-node DIR n2, env DIR, down DIR)

Partitions: low (default, preempted with REQUEUE), kill (preempted with CANCEL), high. Nodes n1, n2, ... claim 8 CPUs
and 8 GPUs each; they share the host, its /tmp and its name: tell them apart by SLURMD_NODENAME. No systemd, no cgroups,
one address (that of the host's name), root or not.

RUNNING is said before a script has begun, and a `slurmd` killed in between fails the job: `wait_text` for a line of the
job's own output before you disturb it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .accounting import Accounting
from .daemons import START_SECONDS, Daemons, until
from .slurm_conf import GPUS, host_address, slurm_conf

FOREIGN = ("SLURM", "SBATCH", "SRUN", "SACCT", "SQUEUE", "SINFO", "SCANCEL", "MUNGE", "MILES_")


def installed() -> bool:
    """Whether the programs of a cluster are on this machine."""
    return all(shutil.which(program, path=_path()) for program in ("slurmctld", "slurmd", "munged", "sbatch"))


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class Testbed:
    """One cluster. `grace`, `kill_wait`, `slurmd_timeout` in seconds; `extra`: further lines of slurm.conf."""

    __test__ = False

    directory: Path
    nodes: int = 4
    grace: int = 3
    kill_wait: int = 2
    slurmd_timeout: int = 5
    send_user_signal: bool = False
    requeue: bool = True
    accounting: bool = False
    extra: list[str] = field(default_factory=list)
    port: int = field(default=0, repr=False)

    @property
    def names(self) -> list[str]:
        """Names of the nodes."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user of this cluster: this process's own, without what belongs to a job."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        run = self.directory / "run"
        return kept | {"PATH": _path(), "SLURM_CONF": str(self._conf), "MUNGE_SOCKET": str(run / "munge.sock")}

    # Life of the cluster

    def up(self) -> Testbed:
        """Start what does not run. Raises RuntimeError with the ends of the logs."""
        for name in ("", "etc", "run", "log", "state", "spool", "dev"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
            (self.directory / name).chmod(0o755)
        fresh = not self._conf.exists()
        for attempts_left in (2, 1, 0):
            if fresh:
                self.port = _free_ports(self.nodes)
                self._write_configuration()
            try:
                self._start()
                return self
            except (RuntimeError, subprocess.SubprocessError) as error:
                if not fresh or not attempts_left:
                    raise RuntimeError(f"the cluster does not start: {error}\n{self._log_ends()}") from error
                self.down()  # somebody may have taken a port meanwhile
                for name in ("state", "spool"):
                    shutil.rmtree(self.directory / name)
                    (self.directory / name).mkdir(mode=0o755)
        raise AssertionError("unreachable")

    def down(self) -> None:
        """Cancel all jobs and end every daemon and everything that jobs left behind. The directory stays."""
        if self._daemons.pid("slurmctld"):
            jobs = self._query("squeue", "-h", "-o", "%A").split()
            if jobs:
                self._query("scancel", *sorted(set(jobs)))
                until(lambda: not self._query("squeue", "-h", "-o", "%A"), self.kill_wait + 8)
        for name in self.names:
            self._daemons.end(f"slurmd.{name}")
        self._daemons.end("slurmctld")
        if self.accounting:
            self._accounting.end()
        self._daemons.end("munged")
        self._end_leftovers()

    def kill_node(self, name: str) -> None:
        """SIGKILL the slurmd of a node: Slurm says DOWN after some 25 s. Its jobs' processes go on, unsignalled."""
        pid = self._daemons.pid(f"slurmd.{name}")
        if pid is None:
            raise RuntimeError(f"{name} does not run")
        os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node that was killed; without effect on one that runs."""
        if self._daemons.pid(f"slurmd.{name}") is None:
            (self.directory / "spool" / name).mkdir(exist_ok=True)
            self._daemons.start(f"slurmd.{name}", "slurmd", "-N", name, "-f", str(self._conf))
            # Until it listens, the controller may think of its predecessor as alive and launch into nothing.
            port = self.port + int(name[1:])
            if not until(lambda: not _is_free(port), START_SECONDS):
                raise RuntimeError(f"slurmd of {name} does not listen on port {port}")

    def set_down(self, name: str) -> None:
        """Declare a node down: what depends on it fails or is requeued at once. It comes back by itself in a second."""
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def stop_controller(self) -> None:
        """End slurmctld in order; running jobs go on, commands fail. `up` starts it again."""
        self._daemons.end("slurmctld")

    def stop_accounting(self) -> None:
        """End slurmdbd and its database: `sacct` fails. `up` starts them again."""
        self._accounting.end()

    def reset(self, seconds: float = 60.0) -> None:
        """No jobs, every node idle. Raises TimeoutError."""
        self.up()
        if jobs := self.run("squeue", "-h", "-o", "%A").split():
            self._query("scancel", *sorted(set(jobs)))
        if not until(self._idle, seconds):
            raise TimeoutError(f"the cluster does not become idle:\n{self.run('sinfo')}\n{self.run('squeue')}")

    # Use of the cluster

    def run(self, *command: object, check: bool = True, seconds: float = 60.0) -> str:
        """Standard output of a command of a user of this cluster, stripped; RuntimeError when it fails."""
        arguments = [str(part) for part in command]
        done = subprocess.run(
            arguments,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def sbatch(self, script: str, *options: object, directory: Path | None = None) -> int:
        """Submit a script; the id of its job."""
        arguments = ["sbatch", "--parsable", *map(str, options)]
        done = subprocess.run(
            arguments, env=self.environment, input=script, capture_output=True, text=True, timeout=60, cwd=directory
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(arguments)}: {done.stderr}")
        return int(done.stdout.split(";")[0])

    def show(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says, by its keys (JobState, Restarts, NodeList, ...); values end at a space."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_state(self, job: int, *states: str, restarts: int = 0, seconds: float = 60.0) -> dict[str, str]:
        """Wait until the job is in one of the states, after at least so many restarts. Raises TimeoutError."""
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.show(job))
            return found["JobState"] in states and int(found["Restarts"]) >= restarts

        if not until(there, seconds):
            told = {key: found.get(key) for key in ("JobState", "Reason", "Restarts", "ExitCode")}
            raise TimeoutError(f"job {job} is {told}, wanted {states} after {restarts} restarts")
        return found

    def preempt(self, target: int | Sequence[str], seconds: float = 1.0) -> int:
        """Submit a job of partition high to the nodes of a job, or to nodes by name, that holds them for `seconds`."""
        nodes = self._nodes_of(target) if isinstance(target, int) else list(target)
        options = ("-p", "high", "--exclusive", f"-N{len(nodes)}", "-w", ",".join(nodes), "-o", "/dev/null")
        return self.sbatch(f"#!/bin/bash\nsleep {seconds}\n", *options)

    def _nodes_of(self, job: int) -> list[str]:
        return self.run("scontrol", "show", "hostnames", self.show(job)["NodeList"]).split()

    # Inside

    @property
    def _conf(self) -> Path:
        return self.directory / "etc" / "slurm.conf"

    @property
    def _daemons(self) -> Daemons:
        return Daemons(self.directory, self.environment)

    @property
    def _accounting(self) -> Accounting:
        return Accounting(self.directory, self.port + self.nodes + 1, self._daemons)

    def _write_configuration(self) -> None:
        etc, host = self.directory / "etc", socket.gethostname().split(".")[0]
        accounting = self._accounting.slurm_conf() if self.accounting else {}
        (etc / "slurm.conf").write_text(slurm_conf(self, host, accounting))
        gpus = [self.directory / "dev" / f"gpu{number}" for number in range(GPUS)]
        for gpu in gpus:  # a file that is no device is refused; without files CUDA_VISIBLE_DEVICES is not set
            gpu.unlink(missing_ok=True)
            gpu.symlink_to("/dev/null")
        files = self.directory / "dev" / f"gpu[0-{GPUS - 1}]"
        (etc / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-{self.nodes}] Name=gpu File={files}\n")
        constraints = [f"Constrain{what}=no\n" for what in ("Cores", "Devices", "RAMSpace")]
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n" + "".join(constraints))
        (etc / "plugstack.conf").write_text("")
        settings = asdict(self) | {"directory": str(self.directory)}
        (self.directory / "settings.json").write_text(json.dumps(settings))

    def _start(self) -> None:
        etc, run = self.directory / "etc", self.directory / "run"
        if self._daemons.pid("munged") is None:
            key = etc / "munge.key"
            if not key.exists():
                key.touch(mode=0o600)
                key.write_bytes(secrets.token_bytes(1024))
            (run / "munge.sock").unlink(missing_ok=True)
            (run / "munge.sock.lock").unlink(missing_ok=True)
            files = [f"--key-file={key}", f"--socket={run / 'munge.sock'}", f"--pid-file={run / 'munged.pid'}"]
            files += [f"--log-file={self.directory / 'log/munged.log'}", f"--seed-file={self.directory / 'state/seed'}"]
            self._daemons.start("munged", "munged", "--force", *files)
        if self.accounting:
            self._accounting.start()
        if self._daemons.pid("slurmctld") is None:
            self._daemons.start("slurmctld", "slurmctld", "-f", str(self._conf))
        for name in self.names:
            self.start_node(name)
        if not until(self._all_up, START_SECONDS):
            raise RuntimeError(f"its nodes are not all up: {self._query('sinfo')}")

    def _end_leftovers(self) -> None:
        """Kill steps and processes of jobs of this cluster: those that carry its SLURM_CONF and the id of a job."""
        ours = f"SLURM_CONF={self._conf}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "comm").read_text().strip()
            except OSError:
                continue
            of_a_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
            if ours in variables and (of_a_job or command == "slurmstepd"):
                try:
                    os.kill(int(entry.name), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _query(self, *command: str) -> str:
        """Output of a command whose failure does not matter."""
        try:
            return self.run(*command, check=False, seconds=15)
        except subprocess.TimeoutExpired:
            return ""

    def _all_up(self) -> bool:
        states = self._query("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split()
        return len(states) == self.nodes and all(state in ("idle", "mix", "alloc", "comp") for state in states)

    def _idle(self) -> bool:
        bad = self._query("sinfo", "-h", "-N", "-p", "low", "-t", "down,drain,fail", "-o", "%N").split()
        if bad:
            self._query("scontrol", "update", f"NodeName={','.join(bad)}", "State=RESUME")
        states = self._query("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split()
        return states == ["idle"] * self.nodes and not self._query("squeue", "-h")

    def _log_ends(self) -> str:
        logs = sorted((self.directory / "log").iterdir())
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-12:]) for log in logs)


def load(directory: Path) -> Testbed:
    """The cluster that was made in a directory."""
    settings = json.loads((directory / "settings.json").read_text())
    return Testbed(**(settings | {"directory": directory}))


def wait_text(path: Path, text: str, seconds: float = 30.0) -> str:
    """Wait until a file holds `text`; what it holds then. Raises TimeoutError."""
    if not until(lambda: path.exists() and text in path.read_text(errors="replace"), seconds):
        raise TimeoutError(f"{text!r} is not in {path}: {path.read_text() if path.exists() else 'no such file'}")
    return path.read_text(errors="replace")


def _free_ports(nodes: int) -> int:
    """A base of ports that nobody listens on now, below those that the kernel hands out."""
    for _ in range(100):
        base = random.randrange(20000, 32000, 50)
        if all(_is_free(base + offset) for offset in range(nodes + 3)):
            return base
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host_address(), port)) != 0


def main() -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(description="A Slurm cluster on this host.")
    parser.add_argument("command", choices=("up", "down", "env", "kill-node", "start-node", "preempt"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("node", nargs="*", help="of kill-node, start-node and preempt")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--grace", type=int, default=3)
    parser.add_argument("--send-user-signal", action="store_true")
    parser.add_argument("--no-requeue", action="store_true", help="JobRequeue=0")
    given = parser.parse_args()
    directory = given.directory.resolve()
    if (directory / "settings.json").exists():
        bed = load(directory)
    else:
        bed = Testbed(directory, given.nodes, given.grace)
        bed.send_user_signal, bed.requeue = given.send_user_signal, not given.no_requeue
    if given.command == "up":
        bed.up()
    elif given.command == "down":
        bed.down()
    elif given.command == "preempt":
        bed.preempt(given.node)
    else:
        for node in given.node:
            (bed.kill_node if given.command == "kill-node" else bed.start_node)(node)
    if given.command in ("up", "env"):
        for name in ("SLURM_CONF", "MUNGE_SOCKET"):
            print(f"export {name}={shlex.quote(bed.environment[name])}")


if __name__ == "__main__":
    main()
