"""Slurm's commands, run with time limits and read into values; what they refuse becomes one error with a remedy.

Owns the command lines. What their output means belongs to `states` (jobs) and `site` (partitions, nodes).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from miles.cluster.slurm.environment import command_environment, job_environment
from miles.cluster.slurm.ids import JobId
from miles.cluster.slurm.site import NodeGroup, Partition, parse_config, parse_node_groups, parse_partition
from miles.cluster.slurm.states import (
    SACCT_FORMAT,
    SQUEUE_FORMAT,
    Job,
    parse_sacct,
    parse_scontrol_job,
    parse_squeue,
    unix_time,
)
from miles.errors import RunError

MAX_IDS = 500
"""Ids in one command line."""
_RETRY_SECONDS = 2.0
_DOWN = (
    "Unable to contact slurm controller",
    "Connection refused",
    "Slurm backup controller in standby mode",
)
_UNANSWERED = ("Socket timed out", "Zero Bytes were transmitted", "Transport endpoint is not connected")


class SlurmError(RunError):
    """A command of Slurm failed, or is not there."""


class SlurmMissing(SlurmError):
    """Slurm's commands, or their configuration, are not on this machine."""


class SlurmDown(SlurmError):
    """The controller cannot be reached, or does not answer."""


class UnknownJob(SlurmError):
    """Slurm has no such job, or not any more."""


@dataclass(frozen=True, slots=True)
class Slurm:
    """Runs Slurm's commands as this user.

    `timeout`: seconds for one command. `patience`: seconds for which a controller that is down is tried again. Every
    method raises SlurmError: its subclass SlurmMissing where there is no Slurm, SlurmDown when the controller cannot be
    reached, UnknownJob for an id that Slurm does not know.
    """

    timeout: float = 60.0
    patience: float = 60.0

    # Jobs

    def submit(self, script: Path, *, hold: bool = False) -> int:
        """Submit a batch script; the id of its job. Variables of sbatch have no effect; what the job gets of this
        process's environment is in `miles.cluster.slurm.environment`.

        `hold`: it does not begin before `release`.
        """
        output = self._run("sbatch", "--parsable", *["--hold"] * hold, str(script), changes=True)
        number = output.strip().splitlines()[-1].split(";")[0] if output.strip() else ""
        if not number.isdecimal():
            raise SlurmError(
                f"sbatch accepted {script} and named no job: {output.strip()!r}",
                fix="`squeue --me` shows whether it was submitted",
            )
        return int(number)

    def release(self, job: int) -> None:
        """Let a job that is held begin."""
        self._run("scontrol", "release", str(job))

    def test_only(self, script: Path) -> str:
        """When and where Slurm would start this script now: `2026-11-23 03:30:49 using 2 processors on nodes ...`."""
        output = self._run("sbatch", "--test-only", str(script))
        # 26.05 has a stray word before "using".
        found = re.search(r"to start at (\S+).*?((?: using .*)?)$", output, flags=re.MULTILINE)
        if found is None:
            return output.strip()
        start = unix_time(found[1])
        shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start)) if start is not None else found[1]
        return f"{shown}{found[2]}".strip()

    def jobs(self, ids: Iterable[JobId]) -> dict[JobId, Job]:
        """Those of the jobs that the controller knows: waiting, running, and ended minutes ago (MinJobAge)."""
        wanted = sorted(set(ids), key=str)
        known: dict[JobId, Job] = {}
        for begin in range(0, len(wanted), MAX_IDS):
            some = ",".join(map(str, wanted[begin : begin + MAX_IDS]))
            try:
                output = self._run("squeue", "-h", "-r", "-t", "all", "-j", some, "-O", SQUEUE_FORMAT)
            except UnknownJob:
                continue
            for job in parse_squeue(output):
                known[job.id] = job
                if job.element is not None:
                    known[job.element] = job
        # The number of an array's last element gets all of the array from squeue.
        return {job: known[job] for job in wanted if job in known}

    def show(self, job: JobId) -> Job | None:
        """One job as scontrol tells it; None when the controller has forgotten it."""
        try:
            return parse_scontrol_job(self._run("scontrol", "-o", "show", "job", str(job)))
        except UnknownJob:
            return None

    def accounted(self, ids: Iterable[JobId], *, strict: bool = False) -> dict[JobId, list[Job]]:
        """Every run of the jobs on the accounting's record, oldest first.

        Empty where sacct does not answer: sites without accounting are normal. With `strict` that is an error.
        """
        wanted = set(ids)
        if not wanted:
            return {}
        try:
            output = self._run(
                "sacct", "-n", "-P", "-D", "-X", "-j", ",".join(sorted(map(str, wanted))), "-o", SACCT_FORMAT
            )
        except SlurmError:
            if strict:
                raise
            return {}
        runs: dict[JobId, list[Job]] = {}
        for job in parse_sacct(output):
            for name in {job.id, job.name} & wanted:
                runs.setdefault(name, []).append(job)
        return runs

    def cancel(self, ids: Iterable[JobId], *, signal: str | None = None, batch: bool = False) -> None:
        """Cancel jobs, or signal their steps, with `batch` their batch script alone. Jobs that have ended are fine."""
        wanted = sorted(set(ids), key=str)
        options = ([f"--signal={signal}"] if signal else []) + (["--batch"] if batch else [])
        for begin in range(0, len(wanted), MAX_IDS):
            try:
                self._run("scancel", *options, *map(str, wanted[begin : begin + MAX_IDS]))
            except UnknownJob:
                continue

    def kill_processes(self, job: JobId) -> None:
        """SIGKILL the processes of the job's first step. The same signal to the whole job would cancel it."""
        self._run("scancel", "--signal=KILL", f"{job}.0")

    def requeue(self, job: JobId) -> None:
        """End the job's run and put it back into the queue. SlurmError where the site or the job forbids it."""
        self._run("scontrol", "requeue", str(job))

    def set_down(self, node: str, *, reason: str) -> None:
        """Declare a node down, which ends or requeues its jobs; administrators only."""
        self._run("scontrol", "update", f"NodeName={node}", "State=DOWN", f"Reason={reason}")

    # The site

    def version(self) -> tuple[int, int]:
        """(22, 5) for 22.05."""
        output = self._run("sbatch", "--version")
        found = re.search(r"(\d+)\.(\d+)", output)
        if found is None:
            raise SlurmError(f"sbatch names no version: {output.strip()!r}", fix="is this Slurm's sbatch?")
        return int(found[1]), int(found[2])

    def partitions(self) -> list[Partition]:
        """The partitions that this user sees."""
        lines = self._run("scontrol", "-o", "show", "partition").splitlines()
        return [partition for line in lines if (partition := parse_partition(line)) is not None]

    def node_groups(self) -> list[NodeGroup]:
        """The nodes of each partition, those of the same kind and state together."""
        return parse_node_groups(self._run("sinfo", "-h", "-o", NodeGroup.FORMAT))

    def config(self) -> dict[str, str]:
        """The controller's settings by their names, as `scontrol show config` prints them; unset ones are left out."""
        return parse_config(self._run("scontrol", "show", "config"))

    # Inside

    def _run(self, program: str, *arguments: str, changes: bool = False) -> str:
        """Output of a command, both streams. `changes`: it must not be repeated unless it certainly did nothing."""
        command = [program, *arguments]
        end = time.monotonic() + self.patience
        while True:
            try:
                return self._once(command, changes)
            except SlurmDown as error:
                unanswered = changes and not any(text in error.message for text in _DOWN)
                if unanswered or time.monotonic() + _RETRY_SECONDS > end:
                    raise
                time.sleep(_RETRY_SECONDS)

    def _once(self, command: list[str], changes: bool) -> str:
        try:
            done = subprocess.run(
                command,
                env=job_environment(os.environ) if changes else command_environment(os.environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
            )
        except FileNotFoundError:
            raise SlurmMissing(
                f"{command[0]} is not on this machine",
                fix="log in to a login node of the cluster, or put Slurm's commands into PATH; "
                "`miles submit FILE --local` runs on this machine without Slurm",
            ) from None
        except subprocess.TimeoutExpired:
            raise SlurmDown(
                f"`{shlex.join(command)}` did not end within {self.timeout:g} s",
                fix=_AFTER_SUBMISSION if changes else "the controller is overloaded or away: try again later",
            ) from None
        said = (done.stdout + done.stderr).strip()
        if done.returncode == 0:
            # sbatch --test-only answers on the other stream.
            return said if "--test-only" in command else done.stdout
        raise _error(command, done.stderr.strip() or said, done.returncode, changes)


_AFTER_SUBMISSION = "it may have been submitted all the same: look at `squeue --me` before you try again"


_REMEDIES = (
    ("nvalid partition", "set slurm.partition to one that `miles doctor` lists"),
    ("nvalid account", "set slurm.account; `sacctmgr show associations user=$USER` lists yours"),
    ("nvalid qos", "set slurm.qos to one that your account may use: `sacctmgr show associations user=$USER`"),
    ("equested time limit is invalid", "lower slurm.time to the partition's limit (`miles doctor` shows it)"),
    ("xceeds partition", "ask for less in [slurm]; `miles doctor` shows the limits of each partition"),
    ("node configuration is not available", "no node is like that: `miles doctor` shows what the nodes have"),
    (
        "nvalid generic resource",
        "the cluster calls its GPUs otherwise: `miles doctor` shows the names for slurm.gpu_type",
    ),
    ("nvalid feature", "`sinfo -o '%f'` shows the features for slurm.constraint"),
    ("presently disabled", 'this job or the site forbids it; slurm.restart = "chain" needs no requeue'),
    ("ccess/permission denied", "only its owner or an administrator may do that"),
    ("more processors requested than permitted", "ask for fewer nodes or CPUs in [slurm]"),
    ("violates accounting/QOS policy", "the limits of your account or QOS forbid it; `squeue --me` shows what counts"),
    ("rror open job_script file", "the shared file system may be away"),
    ("nrecognized option", "[slurm.extra] takes options of sbatch by their long names (`sbatch --help`)"),
)


def _error(command: list[str], said: str, code: int, changes: bool) -> SlurmError:
    line = f"`{shlex.join(command)}` failed ({code})"
    message = f"{line}: {said}" if said else line
    if "nvalid job id" in said:
        return UnknownJob(message, fix="Slurm forgets jobs minutes after their end; `miles status` has our own record")
    if any(text in said for text in _DOWN):
        return SlurmDown(message, fix="the controller of the cluster is down: try again later")
    if any(text in said for text in _UNANSWERED):
        return SlurmDown(message, fix=_AFTER_SUBMISSION if changes else "the controller is overloaded: try again later")
    if "Unable to process configuration" in said or "fetch config" in said:
        return SlurmMissing(message, fix="Slurm is not configured on this machine: use a login node of the cluster")
    fix = next((remedy for text, remedy in _REMEDIES if text in said), "what Slurm says is above")
    return SlurmError(message, fix=fix)
