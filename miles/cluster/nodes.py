"""The head of an allocation and its other nodes: what each does from its start to its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from miles.cluster.allocation import Allocation
from miles.cluster.endings import EndedEarly, continues
from miles.cluster.jobs import InJob, Terms
from miles.cluster.launch import Launch, NodeReport, Over, code_version, failure_of, read_launch, write_launch
from miles.cluster.network import find_network
from miles.cluster.peers import Head, Reporter, Timing, wait_for_launch
from miles.cluster.processes import Launcher, end_leftovers
from miles.cluster.signals import StopSignal
from miles.cluster.supervision import Supervision
from miles.cluster.supervisor import pending_step, supervise
from miles.config.load import load_resolved
from miles.config.schema import RunConfig
from miles.errors import MilesError
from miles.runs.attempts import EndReason
from miles.runs.claim import Claim, Fence
from miles.runs.files import remove_abandoned
from miles.runs.paths import RunPaths
from miles.workflow.kinds import AnyStep, Processes, processes_of

log = logging.getLogger(__name__)


def run_node(
    paths: RunPaths,
    step: str,
    allocation: Allocation,
    stop: StopSignal,
    *,
    timing: Timing | None = None,
    processes: Callable[[AnyStep], Processes] = processes_of,
) -> int:
    """Do this node's part of one step; returns the exit code, which is the head's decision.

    Raises the MilesError that ended it, on the head, and where this node could not do its part.
    """
    timing = timing or Timing()
    if allocation.index == 0:
        _lead(paths, step, allocation, stop, timing, processes)
        return 0
    return _follow(paths, allocation, stop, timing, processes)


def _lead(
    paths: RunPaths,
    step: str,
    allocation: Allocation,
    stop: StopSignal,
    timing: Timing,
    processes: Callable[[AnyStep], Processes],
) -> None:
    """The head: claim the run, and run the step unless it is done."""
    file = paths.allocation(allocation.job, allocation.restart)
    exit_code = 1
    try:
        with Claim.acquire(
            paths, job=allocation.job, restart=allocation.restart, live_jobs=allocation.live_jobs
        ) as claim:
            remove_abandoned(paths.root)
            config = load_resolved(paths.root)
            planned = pending_step(config, paths, step)
            if planned is not None:
                if stop.requested:
                    what = f"step '{step}' was stopped before it began"
                    raise EndedEarly(what, EndReason.PREEMPTED, fix=continues(paths))
                job = _in_job(config, step, allocation, timing)
                supervise(paths, planned, processes(config.steps[step]), stop, claim, job)
        exit_code = 0
    except MilesError as error:
        exit_code = error.exit_code
        raise
    finally:
        if not isinstance(read_launch(file), Over):
            write_launch(file, Over(exit_code))


def _in_job(config: RunConfig, step: str, allocation: Allocation, timing: Timing) -> InJob:
    return InJob(allocation, config.steps[step].slurm, find_network(allocation, None), code_version(), timing)


def _follow(
    paths: RunPaths,
    allocation: Allocation,
    stop: StopSignal,
    timing: Timing,
    processes: Callable[[AnyStep], Processes],
) -> int:
    """Any other node: run this node's share of what the head launches, until it says that it is over."""
    file = paths.allocation(allocation.job, allocation.restart)
    code = code_version()
    launch = wait_for_launch(file, timing, lambda: stop.requested)
    if isinstance(launch, Over):
        return launch.exit_code
    own = NodeReport(allocation.index, allocation.name, 0, time.time(), code, launch.port, "running")
    reporter = Reporter(paths.nodes(launch.attempt), own, timing)
    try:
        head = Head(file, launch, paths.nodes(launch.attempt), reporter, timing)
        return _run_share(paths, allocation, stop, processes, head, launch)
    except MilesError as error:
        # The head learns why this node is gone; it decides what that means.
        reporter.report(error=failure_of(allocation.name, error), gone=True)
        raise


def _run_share(
    paths: RunPaths,
    allocation: Allocation,
    stop: StopSignal,
    processes: Callable[[AnyStep], Processes],
    head: Head,
    launch: Launch,
) -> int:
    head.report()
    network = find_network(allocation, launch.address)
    for name in end_leftovers(paths):
        log.warning("ended %s, which an earlier attempt left behind", name)
    config = load_resolved(paths.root)
    step = config.steps[launch.step]
    needed = processes(step)
    job = InJob(allocation, step.slurm, network, launch.code)
    launcher = Launcher(
        paths, launch.step, launch.attempt, launch.claim, node=allocation.index, port_seed=allocation.port_seed
    )
    fence, terms = Fence(paths, launch.claim), Terms.of(needed.local, job)
    supervision = Supervision(launcher, needed, stop, fence, head, terms, network, node=allocation.index)
    try:
        supervision.start()
        supervision.follow(head)
    finally:
        supervision.end()
    head.report(gone=True)
    assert head.over is not None
    return head.over.exit_code
