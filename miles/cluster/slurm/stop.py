"""Stopping a run on Slurm: exactly the jobs on its record, the running one at its boundary with everything saved."""

from __future__ import annotations

import json
import socket
import time

from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.queue import Queue, SubmittedJob, ask
from miles.errors import RunError
from miles.runs.claim import current_holder
from miles.runs.files import write_atomic
from miles.runs.paths import RunPaths

POLL_SECONDS = 1.0


def stop_jobs(paths: RunPaths, slurm: Slurm, *, now: bool, timeout: float) -> list[SubmittedJob]:
    """Stop all jobs of the run, wait until they have ended, and return them.

    Jobs that wait are cancelled first, so that none takes over from the one that ends. `now` cancels all of them.
    Raises RunError when no job of the run is live, or one has not ended within `timeout` seconds.
    """
    queue = ask(paths, slurm)
    if not queue.live:
        name = paths.root.name
        raise RunError(f"run '{name}' is not running", fix=f"`miles status {name}` shows where it stands")
    request = {"time": time.time(), "host": socket.gethostname(), "now": now}
    write_atomic(paths.stop_request, json.dumps(request) + "\n")
    stopped = queue.live
    if now:
        slurm.cancel([job.record.id for job in queue.live])
        _wait(paths, slurm, timeout)
        return stopped
    if queue.waiting:
        slurm.cancel([job.record.id for job in queue.waiting])
    _ask_running(paths, slurm, queue)
    _wait(paths, slurm, timeout)
    return stopped


def _ask_running(paths: RunPaths, slurm: Slurm, queue: Queue) -> None:
    """Signal the supervisors. A job in which none has claimed the run yet has nothing to save: it is cancelled."""
    running = [job.record.id for job in queue.running]
    if not running:
        return
    if current_holder(paths) is None:
        slurm.cancel(running)
    else:
        slurm.cancel(running, signal="USR1")


def _wait(paths: RunPaths, slurm: Slurm, timeout: float) -> None:
    """Return when no job is live; cancel what waits, also one that put itself back into the queue meanwhile."""
    deadline = time.monotonic() + timeout
    while (queue := ask(paths, slurm)).live:
        if queue.waiting:
            slurm.cancel([job.record.id for job in queue.waiting])
        if time.monotonic() > deadline:
            names = ", ".join(map(str, queue.live))
            raise RunError(
                f"run '{paths.root.name}' has not stopped within {timeout:g} s: {names}",
                fix=f"`miles stop {paths.root.name} --now`",
            )
        time.sleep(POLL_SECONDS)
