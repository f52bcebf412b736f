"""A run on this machine: the driver process, which runs the pending steps in turn, and how to start it.

    python -m miles.cluster.local --run-dir D

The driver is a process and session of its own, so that a closed terminal cannot take the run with it. It
holds the claim on the run while it lives.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from miles.cluster.endings import continues, interrupted
from miles.cluster.processes import POLL_SECONDS
from miles.cluster.signals import REPEAT_SECONDS, StopSignal
from miles.cluster.supervisor import log_to_stderr, supervise
from miles.config.load import load_resolved
from miles.config.schema import RunConfig
from miles.errors import MilesError, RunError
from miles.runs.claim import Claim, Holder, current_holder
from miles.runs.failures import FAILURE_VARIABLE, exit_with_failures, read_failure
from miles.runs.files import disk_errors, full_disk, remove_abandoned
from miles.runs.paths import RunPaths
from miles.workflow.kinds import processes_of
from miles.workflow.plan import PlannedStep, plan_run


def run_workflow(paths: RunPaths, stop: StopSignal) -> None:
    """Claim the run and run every step that is not done. Raises the MilesError of the first that fails."""
    with Claim.acquire(paths) as claim:
        remove_abandoned(paths.root)
        config = load_resolved(paths.root)
        for planned in _pending(config, paths):
            if stop.requested:
                raise interrupted(f"stopped before step '{planned.name}'", paths)
            supervise(paths, planned, processes_of(config.steps[planned.name]), stop, claim)


def start_driver(paths: RunPaths) -> Driver:
    """Start the driver process of a run. It goes on when this process ends."""
    paths.driver_failure.unlink(missing_ok=True)
    with disk_errors(paths.driver_log), paths.driver_log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "miles.cluster.local", "--run-dir", str(paths.root)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {FAILURE_VARIABLE: str(paths.driver_failure)},
            start_new_session=True,
        )
    return Driver(paths, process)


class Driver:
    """The running driver process as its parent sees it."""

    def __init__(self, paths: RunPaths, process: subprocess.Popen[bytes]) -> None:
        self._paths = paths
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Ask it to stop at the next boundary; asked again, it ends everything at once."""
        self._process.send_signal(signal.SIGTERM)

    def failure(self) -> MilesError | None:
        """The error that ended it; None when all steps are done."""
        code = self._process.wait()
        if code == 0:
            return None
        if code == -signal.SIGTERM:
            return interrupted("the run was stopped before it began", self._paths)
        explained = read_failure(self._paths.driver_failure) or full_disk(self._paths.root)
        return explained or RunError(
            f"the process that ran the steps ended with exit code {code} and left no word",
            fix=f"read {self._paths.driver_log}; {continues(self._paths)}",
        )


def stop_run(paths: RunPaths, *, now: bool, timeout: float) -> Holder:
    """Ask the process that drives a run to stop and wait until it has gone; returns who it was.

    `now` ends everything at once instead of at the next boundary. Raises RunError when nobody drives the run,
    when it is driven on another host, or when it has not gone within `timeout` seconds.
    """
    name = paths.root.name
    holder = current_holder(paths)
    if holder is None:
        raise RunError(f"run '{name}' is not running", fix=f"`miles status {name}` shows where it stands")
    if not holder.identity.local:
        raise RunError(f"run '{name}' is driven on {holder.identity.host}", fix=f"run `miles stop {name}` on that host")
    os.kill(holder.identity.pid, signal.SIGTERM)
    if now:
        time.sleep(2 * REPEAT_SECONDS)
        if holder.identity.alive():
            os.kill(holder.identity.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while holder.identity.alive():
        if time.monotonic() > deadline:
            raise RunError(f"run '{name}' has not stopped within {timeout:g} s", fix=f"`miles stop {name} --now`")
        time.sleep(POLL_SECONDS)
    return holder


def _pending(config: RunConfig, paths: RunPaths) -> Iterator[PlannedStep]:
    """Steps to do, in order; each is planned when its turn comes, because earlier ones change its inputs."""
    for name in [planned.name for planned in plan_run(config, paths)]:
        planned = next(step for step in plan_run(config, paths) if step.name == name)
        if planned.done is None:
            yield planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args()
    log_to_stderr()
    stop = StopSignal()
    stop.listen()
    run_workflow(RunPaths(arguments.run_dir.absolute()), stop)


if __name__ == "__main__":
    exit_with_failures(main)
