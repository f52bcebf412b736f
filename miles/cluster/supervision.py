"""The processes of one step on one node: started together, watched, and ended together.

Ranks wait for the engines themselves. The death of a rank, or a signal, ends all of them. With several nodes each has a
`Supervision` of its own share, and the head's decides. Owns no health of engines (`miles.cluster.engines`), no record
of the attempt (`miles.cluster.supervisor`) and nothing of what the processes do.
"""

from __future__ import annotations

import logging
import signal
import time
from typing import Literal

from miles.cluster.cpu import available_cores, cpu_environment, rank_environment
from miles.cluster.endings import EndedEarly, continues, interrupted
from miles.cluster.engines import PORT_TRIES, Engines
from miles.cluster.jobs import RANK_GRACE_SECONDS, Terms
from miles.cluster.launch import Failure, cause, failure_of
from miles.cluster.network import ONE_NODE, Network
from miles.cluster.peers import Followers, Head
from miles.cluster.ports import choose_ports
from miles.cluster.processes import POLL_SECONDS, Child, Command, Launcher, terminate
from miles.cluster.signals import StopSignal
from miles.errors import Interrupted, MilesError, PortTaken, RankLost
from miles.runs.attempts import EndReason
from miles.runs.claim import Fence
from miles.runs.endpoints import ENGINES_VARIABLE
from miles.workflow.kinds import Processes

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
        # They have nothing left to say, and the time of a job that was asked to end is counted.
        self._engines.end(grace=0.0 if self._stop.requested else END_GRACE_SECONDS, hurry=self._in_a_hurry)

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
        peers.meet_at(choose_meeting_port(self._launcher, self._network, avoid=self._port))
        self._begin_anew(peers.port)

    def _signal_ranks(self) -> EndReason | None:
        """Ask the ranks to end at their boundary; returns why, None: in no job."""
        why = self._terms.why(self._paths, warned=self._stop.warned)
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
                kind = RankLost if self._processes.role == "trainer" else MilesError
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
        asked = peers.signalled() or self._stop.requested
        why = self._terms.why(self._paths, warned=self._stop.warned) if asked else None
        if why is not None:
            raise EndedEarly(STOPPED_BECAUSE[why].format(step=self._name), why, fix=continues(self._paths))
        if self._terms.deadline is not None:
            raise self._time_is_up()
        raise interrupted(failures[0].message, self._paths)

    def _time_is_up(self, how: str = "") -> EndedEarly:
        what = f"step '{self._name}' came to {self._terms.limit}{how}"
        return EndedEarly(what, EndReason.TIME_LIMIT, fix=continues(self._paths))


def choose_meeting_port(launcher: Launcher, network: Network, *, avoid: int | None = None) -> int:
    """A free port of this node where the trainer ranks can meet."""
    ports = choose_ports(2, seed=launcher.port_seed + 63, host=network.address)
    return next(port for port in ports if port != avoid)
