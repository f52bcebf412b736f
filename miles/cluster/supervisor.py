"""The supervisor: runs one step on this node, from starting its processes to the record of how it ended.

    python -m miles.cluster.supervisor --run-dir D --step NAME

Ranks and engines start together; ranks wait for the engines themselves. The death of a rank, or a signal, ends all of
them. Owns no order of steps (`miles.cluster.local`), no health of engines (`miles.cluster.engines`) and nothing of what
the processes do.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from pathlib import Path

from miles.cluster.cpu import available_cores, cpu_environment, rank_environment
from miles.cluster.engines import Engines
from miles.cluster.ports import choose_ports
from miles.cluster.processes import POLL_SECONDS, Child, Command, Launcher, end_leftovers, terminate, wait_for_ends
from miles.cluster.signals import StopSignal
from miles.config.load import load_resolved
from miles.errors import ConfigError, EngineError, Interrupted, MilesError, TrainerError, did_you_mean
from miles.runs.attempts import EndReason, begin_attempt, end_attempt
from miles.runs.claim import Claim, Fence
from miles.runs.endpoints import ENGINES_VARIABLE
from miles.runs.failures import exit_with_failures
from miles.runs.paths import RunPaths
from miles.workflow.done import write_done
from miles.workflow.kinds import Processes, processes_of
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.stage import open_stage

RANK_GRACE_SECONDS = 120.0
"""How long ranks may take to save everything and end after they were asked to stop."""
END_GRACE_SECONDS = 10.0
"""How long any process may take to end when there is nothing left to wait for."""
FENCE_SECONDS = 5.0
"""How often the supervisor looks whether a newer attempt has taken the run over."""

log = logging.getLogger(__name__)


class TimeIsUp(Interrupted):
    """The attempt ended because its time limit was near; the same command continues the run."""


def supervise(paths: RunPaths, planned: PlannedStep, processes: Processes, stop: StopSignal, claim: Claim) -> None:
    """Run one step of a claimed run to its end, and record the attempt.

    Raises the MilesError that ended it: EngineError, TrainerError, Interrupted, RunError when a newer attempt has taken
    the run over (then nothing is recorded: the ledger is the other's), or what a process reported.
    """
    fence = Fence(paths, claim.number)
    fence.check()
    for name in end_leftovers(paths):
        log.warning("ended %s, which an earlier attempt left behind", name)
    note = open_stage(paths, planned)
    attempt = begin_attempt(paths, planned.name, note=note)
    log.info("step %s: attempt %d%s", planned.name, attempt, f" ({note})" if note else "")
    began = time.time()
    launcher = Launcher(paths, planned.name, attempt, claim.number)
    supervision = Supervision(launcher, processes, stop, fence)
    try:
        try:
            supervision.run()
        finally:
            supervision.end()
        fence.check()
        now = time.time()
        write_done(paths, planned.name, planned.inputs, attempt=attempt, finished=now, seconds=now - began)
    except MilesError as error:
        fence.check()
        reason = end_reason(error, engines_came_up=supervision.engines_came_up)
        end_attempt(paths, attempt, reason, exit_code=error.exit_code, detail=error.message)
        if reason in (EndReason.ENGINE_CRASH, EndReason.TRAINER_CRASH):
            error.fix = "; ".join(filter(None, [error.fix, continues(paths)]))
        raise
    except BaseException as error:
        fence.check()
        end_attempt(paths, attempt, EndReason.FAILED, exit_code=1, detail=f"{type(error).__name__}: {error}")
        raise
    end_attempt(paths, attempt, EndReason.FINISHED)
    log.info("step %s: done after %.1f s", planned.name, now - began)


def interrupted(what: str, paths: RunPaths) -> Interrupted:
    """The error of a run that was asked to stop, with the command that continues it."""
    return Interrupted(what, fix=continues(paths))


def continues(paths: RunPaths) -> str:
    """The command that continues a run, in a sentence."""
    return f"`miles resume {paths.root}` continues the run"


def end_reason(error: MilesError, *, engines_came_up: bool) -> EndReason:
    """The ledger's word for an error that ended a step."""
    match error:
        case TimeIsUp():
            return EndReason.TIME_LIMIT
        case Interrupted():
            return EndReason.STOPPED
        case EngineError():
            return EndReason.ENGINE_CRASH if engines_came_up else EndReason.ENGINE_START
        case TrainerError():
            return EndReason.TRAINER_CRASH
        case _:
            return EndReason.FAILED


class Supervision:
    """The processes of one attempt of one step."""

    def __init__(self, launcher: Launcher, processes: Processes, stop: StopSignal, fence: Fence) -> None:
        self._paths = launcher.paths
        self._name = launcher.step
        self._processes = processes
        self._stop = stop
        self._fence = fence
        self._fence_checked = time.monotonic()
        limit = processes.local.time_limit_minutes
        self._deadline = None if limit is None else time.time() + 60 * limit
        self._launcher = launcher
        self._engines = Engines(launcher, processes)
        self._ranks: list[Child] = []

    @property
    def engines_came_up(self) -> bool:
        return self._engines.came_up

    def run(self) -> None:
        """Start everything; return when all ranks have ended well, else raise what ended the step."""
        self._engines.start()
        self._start_ranks()
        while not self._finished():
            if self._stop.requested:
                self._stop_ranks()
            elif self._deadline is not None and time.time() > self._deadline:
                raise self._time_is_up(" and did not end in time by itself")
            else:
                self._check_fence()
                self._engines.check()
                self._check_ranks()
                time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """End every process that is left: engines last, because ranks collect from them what was generated."""
        terminate(self._ranks, grace=END_GRACE_SECONDS, hurry=self._in_a_hurry)
        self._engines.end(grace=END_GRACE_SECONDS, hurry=self._in_a_hurry)

    def _finished(self) -> bool:
        return all(rank.exit_code() == 0 for rank in self._ranks)

    def _in_a_hurry(self) -> bool:
        return self._stop.urgent

    def _start_ranks(self) -> None:
        (port,) = choose_ports(1, seed=64 * os.getpid() + 63)
        count = self._processes.ranks
        environment = cpu_environment(
            threads=self._processes.local.threads, processes=count, cores=available_cores()
        ) | {ENGINES_VARIABLE: str(self._engines.file), "MILES_GRACE_SECONDS": f"{RANK_GRACE_SECONDS:g}"}
        if self._deadline is not None:
            environment["MILES_DEADLINE"] = repr(self._deadline)
        for rank in range(count):
            rank_env = environment | rank_environment(rank=rank, ranks=count, port=port)
            command = Command(self._processes.role, rank, self._processes.module, environment=rank_env)
            self._ranks.append(self._launcher.start(command))

    def _stop_ranks(self) -> None:
        """Ask the ranks to end at their boundary and wait. Raises Interrupted unless they were done."""
        asked = time.monotonic()
        for rank in self._ranks:
            rank.signal(signal.SIGTERM)
        wait_for_ends(self._ranks, grace=RANK_GRACE_SECONDS, hurry=self._in_a_hurry)
        if not self._finished():
            what = f"step '{self._name}' was stopped"
            raise interrupted("; ".join([what, *self._disorder(time.monotonic() - asked)]), self._paths)

    def _disorder(self, seconds: float) -> list[str]:
        """What went wrong while the ranks were to save everything and end, in sentences."""
        lines = []
        for rank in self._ranks:
            report = rank.failure()
            if rank.exit_code() is None:
                lines.append(f"{rank.name} had not ended after {seconds:.0f} s and was killed")
            elif report is not None and not isinstance(report, Interrupted):
                lines.append(f"{rank.name} could not end in order: {report.message}")
        return lines

    def _check_fence(self) -> None:
        """Raise RunError when a newer attempt has taken the run over."""
        if time.monotonic() - self._fence_checked > FENCE_SECONDS:
            self._fence.check()
            self._fence_checked = time.monotonic()

    def _check_ranks(self) -> None:
        """Raise what a rank that has ended badly says, else how it ended."""
        failed = [rank for rank in self._ranks if rank.exit_code() not in (None, 0)]
        if not failed:
            return
        # The first to fail is seen together with those that failed because of it: believe who explains.
        reports = [report for rank in failed if (report := rank.failure()) is not None]
        errors = [report for report in reports if not isinstance(report, Interrupted)]
        if errors:
            raise errors[0]
        if not reports:
            kind = TrainerError if self._processes.role == "trainer" else MilesError
            raise kind(failed[0].death(), fix=failed[0].whole_log())
        # They agreed to end, and each has its own to finish.
        wait_for_ends(self._ranks, grace=RANK_GRACE_SECONDS, hurry=self._in_a_hurry)
        raise self._time_is_up() if self._deadline is not None else interrupted(reports[0].message, self._paths)

    def _time_is_up(self, how: str = "") -> TimeIsUp:
        minutes = self._processes.local.time_limit_minutes
        return TimeIsUp(
            f"step '{self._name}' came to its time limit of {minutes:g} minutes{how}", fix=continues(self._paths)
        )


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
        plan = {planned.name: planned for planned in plan_run(config, paths)}
        if arguments.step not in plan:
            raise ConfigError(
                f"the run has no step '{arguments.step}'." + did_you_mean(arguments.step, plan),
                fix=f"its steps are: {', '.join(plan)}",
            )
        if plan[arguments.step].done:
            log.info("step %s is already done", arguments.step)
        else:
            supervise(paths, plan[arguments.step], processes_of(config.steps[arguments.step]), stop, claim)


def log_to_stderr() -> None:
    """Logging of the processes that supervise."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


if __name__ == "__main__":
    exit_with_failures(main)
