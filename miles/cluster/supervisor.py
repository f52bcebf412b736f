"""The supervisor: runs one step on this node, from starting its processes to the record of how it ended.

    python -m miles.cluster.supervisor --run-dir D --step NAME

Engines first, ranks when the engines answer. The death of any process, or a signal, ends all of them. Owns no
order of steps (`miles.cluster.local`) and nothing of what the processes do.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import time
from pathlib import Path

from miles.cluster.cpu import available_cores, cpu_environment, rank_environment
from miles.cluster.health import wait_until_ready
from miles.cluster.ports import LOOPBACK, choose_ports, is_free
from miles.cluster.processes import POLL_SECONDS, Child, Command, first_dead, start, terminate
from miles.cluster.signals import StopSignal
from miles.config.load import load_resolved
from miles.errors import ConfigError, EngineError, Interrupted, MilesError, TrainerError, did_you_mean
from miles.runs.attempts import EndReason, begin_attempt, end_attempt
from miles.runs.claim import Claim
from miles.runs.failures import exit_with_failures
from miles.runs.metrics import drop_stage
from miles.runs.paths import RunPaths
from miles.runs.samples import drop_samples
from miles.workflow.done import write_done
from miles.workflow.kinds import Processes, processes_of
from miles.workflow.plan import PlannedStep, plan_run

RANK_GRACE_SECONDS = 120.0
"""How long ranks may take to reach a boundary after they were asked to stop."""
END_GRACE_SECONDS = 10.0
"""How long any process may take to end when there is nothing left to wait for."""

PORT_TRIES = 3
"""How often engines are started because another program took a port of theirs."""

log = logging.getLogger(__name__)


def supervise(paths: RunPaths, planned: PlannedStep, processes: Processes, stop: StopSignal) -> None:
    """Run one step of a claimed run to its end, and record the attempt.

    Raises the MilesError that ended it: EngineError, TrainerError, Interrupted, or what a process reported.
    """
    note = start_from_the_beginning(paths, planned.name)
    attempt = begin_attempt(paths, planned.name, note=note)
    log.info("step %s: attempt %d%s", planned.name, attempt, f" ({note})" if note else "")
    began = time.time()
    supervision = Supervision(paths, planned.name, attempt, processes, stop)
    try:
        try:
            supervision.run()
        finally:
            supervision.end()
        now = time.time()
        write_done(paths, planned.name, planned.inputs, attempt=attempt, finished=now, seconds=now - began)
    except MilesError as error:
        reason = end_reason(error, ranks_started=supervision.ranks_started)
        end_attempt(paths, attempt, reason, exit_code=error.exit_code, detail=error.message)
        raise
    except BaseException as error:
        end_attempt(paths, attempt, EndReason.FAILED, exit_code=1, detail=f"{type(error).__name__}: {error}")
        raise
    end_attempt(paths, attempt, EndReason.FINISHED)
    log.info("step %s: done after %.1f s", planned.name, now - began)


def interrupted(what: str, paths: RunPaths) -> Interrupted:
    """The error of a run that was asked to stop, with the command that continues it."""
    return Interrupted(what, fix=f"`miles submit {paths.config} --local` continues the run")


def end_reason(error: MilesError, *, ranks_started: bool) -> EndReason:
    """The ledger's word for an error that ended a step."""
    match error:
        case Interrupted():
            return EndReason.STOPPED
        case EngineError():
            return EndReason.ENGINE_CRASH if ranks_started else EndReason.ENGINE_START
        case TrainerError():
            return EndReason.TRAINER_CRASH
        case _:
            return EndReason.FAILED


def start_from_the_beginning(paths: RunPaths, name: str) -> str:
    """Remove what an earlier start of the step left behind; returns a note for people, or an empty string.

    There are no checkpoints yet: a step that was interrupted starts from its beginning.
    """
    lines = drop_stage(paths, name)
    drop_samples(paths, name)
    paths.progress.unlink(missing_ok=True)
    if paths.step(name).exists():
        shutil.rmtree(paths.step(name))
    if lines == 0:
        return ""
    return f"starts again from its beginning; {lines} metrics lines of the earlier start are removed"


class Supervision:
    """The processes of one attempt of one step."""

    def __init__(self, paths: RunPaths, name: str, attempt: int, processes: Processes, stop: StopSignal) -> None:
        self._paths = paths
        self._name = name
        self._attempt = attempt
        self._processes = processes
        self._stop = stop
        self._engines: list[Child] = []
        self._ranks: list[Child] = []

    @property
    def ranks_started(self) -> bool:
        return bool(self._ranks)

    def run(self) -> None:
        """Start everything; return when all ranks have ended well, else raise what ended the step."""
        ports = self._start_engines()
        self._start_ranks([f"http://{LOOPBACK}:{port}" for port in ports])
        while not self._finished():
            if self._stop.requested:
                terminate(self._ranks, grace=RANK_GRACE_SECONDS, hurry=self._in_a_hurry)
                if not self._finished():
                    raise self._interrupted()
            else:
                self._check_processes()
                time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """End every process that is left."""
        terminate(self._ranks, grace=END_GRACE_SECONDS, hurry=self._in_a_hurry)
        terminate(self._engines, grace=END_GRACE_SECONDS, hurry=self._in_a_hurry)

    def _finished(self) -> bool:
        return all(rank.exit_code() == 0 for rank in self._ranks)

    def _in_a_hurry(self) -> bool:
        return self._stop.urgent

    def _start_engines(self, tries: int = PORT_TRIES) -> list[int]:
        """Start the engines and wait until they answer; returns their ports.

        Between the choice of a port and the engine's start another program may take it: then all start on others.
        """
        ports = choose_ports(self._processes.engines, seed=os.getpid() + tries)
        self._launch_engines(ports)
        try:
            self._wait_for_engines(ports)
        except EngineError:
            if tries == 1 or not self._lost_a_port(ports):
                raise
        else:
            return ports
        log.warning("step %s: another program took a port of the engines; they start again on others", self._name)
        terminate(self._engines, grace=END_GRACE_SECONDS, hurry=self._in_a_hurry)
        self._engines.clear()
        return self._start_engines(tries - 1)

    def _lost_a_port(self, ports: list[int]) -> bool:
        """Whether an engine has ended and somebody listens on its port."""
        pairs = zip(self._engines, ports, strict=True)
        return any(engine.exit_code() is not None and not is_free(port) for engine, port in pairs)

    def _launch_engines(self, ports: list[int]) -> None:
        environment = cpu_environment(
            threads=self._processes.local.threads, processes=max(1, len(ports)), cores=available_cores()
        )
        for index, port in enumerate(ports):
            arguments = [*self._arguments(), "--index", str(index), "--port", str(port)]
            command = Command("engine", index, self._processes.engine_module, arguments, environment)
            self._start_into(self._engines, command)

    def _start_ranks(self, engine_urls: list[str]) -> None:
        (port,) = choose_ports(1, seed=os.getpid())
        count = self._processes.ranks
        environment = cpu_environment(
            threads=self._processes.local.threads, processes=count, cores=available_cores()
        ) | {"MILES_ENGINE_URLS": ",".join(engine_urls)}
        for rank in range(count):
            rank_env = environment | rank_environment(rank=rank, ranks=count, port=port)
            command = Command(self._processes.role, rank, self._processes.module, self._arguments(), rank_env)
            self._start_into(self._ranks, command)

    def _start_into(self, children: list[Child], command: Command) -> None:
        child = start(command, self._paths, self._attempt)
        children.append(child)
        log.info("step %s: started %s, process %d, log %s", self._name, child.name, child.pid, child.log)

    def _arguments(self) -> list[str]:
        return ["--run-dir", str(self._paths.root), "--step", self._name]

    def _wait_for_engines(self, ports: list[int]) -> None:
        timeout = self._processes.startup_timeout
        token = self._paths.engine_token.read_text().strip()
        late = wait_until_ready(ports, token, timeout=timeout, interrupted=self._check_start)
        if late:
            child = self._engines[ports.index(late[0])]
            raise EngineError(
                f"{child.name} did not answer within {timeout:g} s\n{_end_of_log(child)}",
                fix="raise engine.startup_timeout if it was still loading",
            )

    def _interrupted(self) -> Interrupted:
        return interrupted(f"step '{self._name}' was stopped", self._paths)

    def _check_start(self) -> None:
        """Raise when the step is asked to stop before its ranks run, or an engine has ended."""
        if self._stop.requested:
            raise self._interrupted()
        self._check_processes()

    def _check_processes(self) -> None:
        """Raise when an engine has ended, or a rank has ended badly."""
        dead = first_dead(self._engines)
        if dead is not None:
            raise dead.failure() or EngineError(_death(dead), fix=self._fix(dead))
        failed = [rank for rank in self._ranks if rank.exit_code() not in (None, 0)]
        if failed:
            # The first to fail is seen together with those that failed because of it: believe who explains.
            reports = [report for rank in failed if (report := rank.failure()) is not None]
            kind = TrainerError if self._processes.role == "trainer" else MilesError
            raise reports[0] if reports else kind(_death(failed[0]), fix=self._fix(failed[0]))

    def _fix(self, child: Child) -> str:
        return f"read the whole log: `miles logs {self._paths.root.name} --role {child.command.role}`"


def _death(child: Child) -> str:
    """How a process ended and the end of its log."""
    code = child.exit_code()
    assert code is not None
    if code >= 0:
        how = f"ended with exit code {code}"
    else:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += " (the system does that when memory runs out)"
    return f"{child.name} (process {child.pid}) {how}\n{_end_of_log(child)}"


def _end_of_log(child: Child) -> str:
    tail = child.log_tail()
    return f"end of {child.log}:\n{tail}" if tail else f"its log {child.log} is empty"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", required=True)
    arguments = parser.parse_args()
    log_to_stderr()
    stop = StopSignal()
    stop.listen()
    paths = RunPaths(arguments.run_dir.absolute())
    with Claim.acquire(paths):
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
            supervise(paths, plan[arguments.step], processes_of(config.steps[arguments.step]), stop)


def log_to_stderr() -> None:
    """Logging of the processes that supervise."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


if __name__ == "__main__":
    exit_with_failures(main)
