"""The supervisor: runs one step on the nodes of an attempt, from starting its processes to the record of how it ended.

    python -m miles.cluster.supervisor --run-dir D --step NAME

Ranks and engines start together; ranks wait for the engines themselves. The death of a rank, or a signal, ends all of
them. On one node, here or in a job, this is all there is; with several nodes each has a `Supervision` of its own share,
and the head's decides. Owns no order of steps (`miles.cluster.local`), no entry of a job's nodes (`miles.cluster.node`),
no health of engines (`miles.cluster.engines`) and nothing of what the processes do.
"""

from __future__ import annotations

import argparse
import logging
import signal
import time
from pathlib import Path
from typing import Literal

from miles.cluster.cpu import available_cores, cpu_environment, rank_environment
from miles.cluster.endings import EndedEarly, end_reason
from miles.cluster.engines import PORT_TRIES, Engines
from miles.cluster.jobs import RANK_GRACE_SECONDS, InJob, Terms, close_killed
from miles.cluster.launch import Failure, Launch, NodeReport, cause, failure_of
from miles.cluster.network import ONE_NODE, Network
from miles.cluster.peers import Followers, Head, Timing
from miles.cluster.ports import choose_ports
from miles.cluster.processes import POLL_SECONDS, Child, Command, Launcher, end_leftovers, terminate
from miles.cluster.signals import StopSignal
from miles.config.load import load_resolved
from miles.config.schema import RunConfig
from miles.errors import ConfigError, Interrupted, MilesError, PortTaken, TrainerError, did_you_mean
from miles.runs.attempts import EndReason, begin_attempt, end_attempt
from miles.runs.claim import Claim, Fence
from miles.runs.endpoints import ENGINES_VARIABLE
from miles.runs.failures import exit_with_failures
from miles.runs.identity import node_name
from miles.runs.paths import RunPaths
from miles.workflow.done import write_done
from miles.workflow.kinds import Processes, processes_of
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.stage import open_stage

END_GRACE_SECONDS = 10.0
"""How long any process may take to end when there is nothing left to wait for."""
FENCE_SECONDS = 5.0
"""How often the supervisor looks whether a newer attempt has taken the run over."""

STOPPED_BECAUSE = {
    None: "step '{step}' was stopped",
    EndReason.STOPPED: "step '{step}' was stopped",
    EndReason.TIME_LIMIT: "step '{step}' came to the end of its job's time limit",
    EndReason.PREEMPTED: "step '{step}' had to make way for another job",
}

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
            reason = end_reason(error, engines_came_up=came_up)
            if place is not None and job is not None:
                reason = job.true_reason(paths, planned.name, place, reason)
            end_attempt(paths, attempt, reason, exit_code=error.exit_code, detail=error.message)
            if reason in (EndReason.ENGINE_CRASH, EndReason.TRAINER_CRASH):
                error.fix = "; ".join(filter(None, [error.fix, continues(paths)]))
            if reason is EndReason.NODE_FAILURE and not isinstance(error, Interrupted):
                raise EndedEarly(error.message, reason, fix=continues(paths)) from error
            raise
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


def interrupted(what: str, paths: RunPaths) -> Interrupted:
    """The error of a run that was asked to stop, with the command that continues it."""
    return Interrupted(what, fix=continues(paths))


def continues(paths: RunPaths) -> str:
    """The command that continues a run, in a sentence."""
    return f"`miles resume {paths.root}` continues the run"


class Supervision:
    """This node's processes of one attempt of one step."""

    def __init__(
        self,
        launcher: Launcher,
        processes: Processes,
        stop: StopSignal,
        fence: Fence,
        peers: Followers | Head,
        terms: Terms,
        network: Network = ONE_NODE,
        *,
        node: int = 0,
    ) -> None:
        self._paths = launcher.paths
        self._name = launcher.step
        self._processes = processes
        self._stop = stop
        self._fence = fence
        self._fence_checked = time.monotonic()
        self._peers = peers
        self._terms = terms
        self._network = network
        self._launcher = launcher
        nodes = len(peers.launch.nodes)
        self._share = processes.share(node, nodes)
        self._engines = Engines(launcher, processes, network, node=node, nodes=nodes)
        self._ranks: list[Child] = []
        self._port = peers.port

    @property
    def engines_came_up(self) -> bool:
        return self._engines.came_up

    def start(self) -> None:
        """Start this node's share."""
        self._engines.start()
        self._start_ranks()

    def end(self) -> None:
        """End every process that is left: engines last, because ranks collect from them what was generated."""
        terminate(self._ranks, grace=END_GRACE_SECONDS, hurry=self._in_a_hurry)
        self._engines.end(grace=END_GRACE_SECONDS, hurry=self._in_a_hurry)

    def lead(self, peers: Followers) -> None:
        """On the head: return when all ranks of all nodes have ended well, else raise what ended the step."""
        tries = PORT_TRIES
        while not self._finished(peers):
            self._report()
            if self._stop.requested:
                self._stop_all(peers)
            elif self._terms.deadline is not None and time.time() > self._terms.deadline:
                raise self._time_is_up(" and did not end in time by itself")
            else:
                self._check_fence()
                self._engines.check()
                peers.look()
                failures = [*self._failures(), *peers.failures()]
                if tries > 1 and any(failure.kind == PortTaken.__name__ for failure in failures):
                    tries -= 1
                    self._meet_elsewhere(peers)
                elif failures and peers.have_spoken():
                    self._give_up(failures, peers)
                time.sleep(POLL_SECONDS)

    def follow(self, head: Head) -> None:
        """On any other node: keep this share alive until the head says that it is over. Raises EndedEarly when the head
        is lost, RunError when a newer attempt has taken the run over; what else goes wrong here is told the head.
        """
        asked, problem = False, None
        while head.over is None:
            self._report(signalled=self._stop.requested, error=problem)
            head.look()
            self._check_fence()
            if self._stop.requested and not asked:
                asked = True
                self._signal_ranks()
            if head.port != self._port:
                self._begin_anew(head.port)
            if not asked and problem is None:
                try:
                    self._engines.check()
                except MilesError as error:
                    problem = failure_of(self._launcher.node_name, error)
            time.sleep(POLL_SECONDS)

    def _finished(self, peers: Followers) -> bool:
        return self._rank_state() == "finished" and peers.finished()

    def _rank_state(self) -> Literal["running", "finished", "ended"]:
        codes = [rank.exit_code() for rank in self._ranks]
        if None in codes:
            return "running"
        return "ended" if any(codes) else "finished"

    def _report(self, **news: object) -> None:
        self._peers.report(
            port=self._port,
            ranks=self._rank_state(),
            failures=tuple(self._failures()),
            engines_came_up=self.engines_came_up,
            **news,
        )

    def _in_a_hurry(self) -> bool:
        return self._stop.urgent

    def _start_ranks(self) -> None:
        self._port = self._peers.port
        ranks, local = self._share.ranks, self._processes.local
        environment = cpu_environment(threads=local.threads, processes=max(1, len(ranks)), cores=available_cores())
        environment |= {ENGINES_VARIABLE: str(self._engines.file), "MILES_GRACE_SECONDS": f"{self._terms.grace:g}"}
        if self._terms.deadline is not None:
            environment["MILES_DEADLINE"] = repr(self._terms.deadline)
        for rank in ranks:
            rank_env = environment | rank_environment(
                rank,
                local_ranks=ranks,
                world=self._share.world,
                address=self._peers.launch.address,
                port=self._port,
                interface=self._network.interface,
            )
            command = Command(self._processes.role, rank, self._processes.module, environment=rank_env)
            self._ranks.append(self._launcher.start(command))

    def _begin_anew(self, port: int) -> None:
        """Start the ranks again, which now meet elsewhere."""
        log.warning("the ranks begin anew and meet at port %d", port)
        terminate(self._ranks, grace=0.0, hurry=self._in_a_hurry)
        self._ranks.clear()
        self._start_ranks()

    def _meet_elsewhere(self, peers: Followers) -> None:
        log.warning("another program took port %d, where the ranks were to meet", self._port)
        peers.meet_at(choose_meeting_port(self._launcher, self._network))
        self._begin_anew(peers.port)

    def _signal_ranks(self) -> EndReason | None:
        """Ask the ranks to end at their boundary; returns why, None: in no job."""
        why = self._terms.why(self._paths)
        for rank in self._ranks:
            rank.signal(signal.SIGUSR1 if why is EndReason.TIME_LIMIT else signal.SIGTERM)
        return why

    def _stop_all(self, peers: Followers) -> None:
        """Ask the ranks to end at their boundary and wait. Raises Interrupted unless they were done."""
        asked = time.monotonic()
        why = self._signal_ranks()
        self._wait_for_ranks(peers)
        if not self._finished(peers):
            what = STOPPED_BECAUSE[why].format(step=self._name)
            message = "; ".join([what, *self._disorder(time.monotonic() - asked)])
            if why is None:
                raise interrupted(message, self._paths)
            raise EndedEarly(message, why, fix=continues(self._paths))

    def _wait_for_ranks(self, peers: Followers) -> None:
        """Wait until the ranks of all nodes have ended; at most as long as they have, or until asked again."""
        deadline = time.monotonic() + max(RANK_GRACE_SECONDS, self._terms.seconds_left)
        while not (self._rank_state() != "running" and peers.ended()):
            self._report()
            if self._in_a_hurry() or time.monotonic() > deadline:
                break
            try:
                peers.look()
            except MilesError as error:
                log.warning("%s", error)
                break
            time.sleep(POLL_SECONDS)

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

    def _failures(self) -> list[Failure]:
        """This node's ranks that have not ended well."""
        failures = []
        for rank in self._ranks:
            code = rank.exit_code()
            if code in (None, 0):
                continue
            assert code is not None
            report = rank.failure()
            if report is not None:
                failures.append(failure_of(rank.name, report))
            else:
                kind = TrainerError if self._processes.role == "trainer" else MilesError
                death = kind(rank.death(), fix=rank.whole_log())
                failures.append(failure_of(rank.name, death, explained=False, killed=code < 0))
        return failures

    def _give_up(self, failures: list[Failure], peers: Followers) -> None:
        """Raise what ended the ranks."""
        # The first to fail is seen together with those that failed because of it: believe who explains.
        failure = cause(failures)
        if failure is not None:
            raise failure.error()
        # They agreed to end, and each has its own to finish.
        self._wait_for_ranks(peers)
        why = self._terms.why(self._paths) if peers.signalled() or self._stop.requested else None
        if why is not None:
            raise EndedEarly(STOPPED_BECAUSE[why].format(step=self._name), why, fix=continues(self._paths))
        if self._terms.deadline is not None:
            raise self._time_is_up()
        raise interrupted(failures[0].message, self._paths)

    def _time_is_up(self, how: str = "") -> EndedEarly:
        what = f"step '{self._name}' came to {self._terms.limit}{how}"
        return EndedEarly(what, EndReason.TIME_LIMIT, fix=continues(self._paths))


def choose_meeting_port(launcher: Launcher, network: Network) -> int:
    """A free port of this node where the trainer ranks can meet."""
    return choose_ports(1, seed=launcher.port_seed + 63, host=network.address)[0]


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
