"""The supervisor: runs one step on the nodes of an attempt, from starting its processes to the record of how it ended.

    python -m miles.cluster.supervisor --run-dir D --step NAME

Owns the life of an attempt. Its processes belong to `miles.cluster.supervision`, the order of steps to
`miles.cluster.local`, the entry of a job's nodes to `miles.cluster.node`.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from miles.cluster.endings import EndedEarly, continues, end_reason, may_pass
from miles.cluster.jobs import InJob, Terms, close_killed
from miles.cluster.launch import Launch, NodeReport
from miles.cluster.network import ONE_NODE, Network
from miles.cluster.peers import Followers, Timing
from miles.cluster.processes import Launcher, end_leftovers
from miles.cluster.signals import StopSignal
from miles.cluster.supervision import Supervision, choose_meeting_port
from miles.config.load import load_resolved
from miles.config.schema import RunConfig
from miles.errors import ConfigError, Interrupted, MilesError, did_you_mean
from miles.runs.attempts import EndReason, begin_attempt, end_attempt
from miles.runs.claim import Claim, Fence
from miles.runs.failures import exit_with_failures
from miles.runs.identity import node_name
from miles.runs.paths import RunPaths
from miles.workflow.done import write_done
from miles.workflow.kinds import Processes, processes_of
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.stage import open_stage

_CRASHES = (EndReason.ENGINE_CRASH, EndReason.TRAINER_CRASH, EndReason.OUT_OF_MEMORY, EndReason.NODE_FAILURE)

log = logging.getLogger(__name__)


def supervise(
    paths: RunPaths,
    planned: PlannedStep,
    processes: Processes,
    stop: StopSignal,
    claim: Claim,
    job: InJob | None = None,
) -> None:
    """Run one step of a claimed run to its end, and record the attempt. `job`: None where it runs in none.

    Raises the MilesError that ended it: EngineError, TrainerError, Interrupted, RunError when a newer attempt has taken
    the run over (then nothing is recorded: the ledger is the other's), or what a process reported.
    """
    fence = Fence(paths, claim.number)
    fence.check()
    for name in end_leftovers(paths):
        log.warning("ended %s, which an earlier attempt left behind", name)
    close_killed(paths)
    if job is not None:
        job.check_budget(paths, planned.name)
    note, place = open_stage(paths, planned), None
    if job is not None:
        place = job.place(paths, planned.name, processes)
        note = "; ".join(filter(None, [note, job.size_note(paths, planned.name, place)]))
    attempt = begin_attempt(paths, planned.name, note=note, place=place)
    log.info("step %s: attempt %d%s", planned.name, attempt, f" ({note})" if note else "")
    began = time.time()
    launcher = Launcher(
        paths, planned.name, attempt, claim.number, port_seed=None if job is None else job.allocation.port_seed
    )
    network = ONE_NODE if job is None else job.network
    followers = _launch(launcher, network, job)
    terms = Terms.of(processes.local, job)
    supervision = Supervision(launcher, processes, stop, fence, followers, terms, network)
    with followers.told_the_end():
        try:
            try:
                supervision.start()
                supervision.lead(followers)
            finally:
                supervision.end()
            fence.check()
            now = time.time()
            write_done(paths, planned.name, planned.inputs, attempt=attempt, finished=now, seconds=now - began)
        except MilesError as error:
            fence.check()
            came_up = supervision.engines_came_up and followers.engines_came_up()
            reason, detail = end_reason(error, engines_came_up=came_up), error.message
            if place is not None and job is not None:
                seen, reason = reason, job.true_reason(paths, planned.name, place, reason)
                if seen is not reason and isinstance(error, EndedEarly):
                    detail = f"Slurm ended the job of step '{planned.name}': {reason}"
            if reason in _CRASHES:
                error.fix = "; ".join(filter(None, [error.fix, continues(paths)]))
            ended = error
            if job is not None and not isinstance(error, Interrupted) and may_pass(error, reason):
                ended = EndedEarly(error.message, reason, fix=error.fix)
            end_attempt(paths, attempt, reason, exit_code=ended.exit_code, detail=detail)
            if ended is error:
                raise
            raise ended from error
        except BaseException as error:
            fence.check()
            end_attempt(paths, attempt, EndReason.FAILED, exit_code=1, detail=f"{type(error).__name__}: {error}")
            raise
        end_attempt(paths, attempt, EndReason.FINISHED)
        log.info("step %s: done after %.1f s", planned.name, now - began)


def _launch(launcher: Launcher, network: Network, job: InJob | None) -> Followers:
    """Tell the other nodes what to start, where there are any."""
    paths = launcher.paths
    launch = Launch(
        step=launcher.step,
        attempt=launcher.attempt,
        claim=launcher.claim,
        nodes=(node_name(),) if job is None else job.allocation.nodes,
        address=network.address,
        port=choose_meeting_port(launcher, network),
        code="" if job is None else job.code,
        time=time.time(),
    )
    own = NodeReport(0, launch.nodes[0], 0, launch.time, launch.code, launch.port, "running")
    file = None if job is None else job.launch_file(paths)
    return Followers(file, launch, paths.nodes(launcher.attempt), own, Timing() if job is None else job.timing)


def pending_step(config: RunConfig, paths: RunPaths, step: str) -> PlannedStep | None:
    """One step of a run; None when it is done already. Raises ConfigError when there is no such step."""
    plan = {planned.name: planned for planned in plan_run(config, paths)}
    if step not in plan:
        raise ConfigError(
            f"the run has no step '{step}'." + did_you_mean(step, plan), fix=f"its steps are: {', '.join(plan)}"
        )
    if plan[step].done:
        log.info("step %s is already done", step)
        return None
    return plan[step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", required=True)
    arguments = parser.parse_args()
    log_to_stderr()
    stop = StopSignal()
    stop.listen()
    paths = RunPaths(arguments.run_dir.absolute())
    with Claim.acquire(paths) as claim:
        config = load_resolved(paths.root)
        planned = pending_step(config, paths, arguments.step)
        if planned is not None:
            supervise(paths, planned, processes_of(config.steps[arguments.step]), stop, claim)


def log_to_stderr() -> None:
    """Logging of the processes that supervise."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


if __name__ == "__main__":
    exit_with_failures(main)
