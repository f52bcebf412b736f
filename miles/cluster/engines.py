"""The inference engines of one attempt: started, watched, started again when they die or hang.

Owns when an engine counts as ready, dead or hung, and the file that tells the ranks where the engines are. Processes in
general belong to `miles.cluster.processes`, what an engine does to `miles.engines`.
"""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections.abc import Callable

from miles.cluster.cpu import available_cores, cpu_environment
from miles.cluster.health import HealthWatch
from miles.cluster.network import Network
from miles.cluster.ports import choose_ports, is_free
from miles.cluster.processes import Child, Command, Launcher, terminate
from miles.errors import EngineError, EngineLost, MilesError
from miles.runs.endpoints import Endpoint, write_endpoints
from miles.workflow.kinds import Processes

PORT_TRIES = 3
"""How often a start is tried because another program took the port."""

_LONGEST_TICK = 1.0
"""Seconds between two looks that count at most: a job that was suspended as a whole does not blame its engines."""

log = logging.getLogger(__name__)


class Engines:
    """This node's engines of one attempt. `check` is to be called many times a second; it does not wait."""

    def __init__(self, launcher: Launcher, processes: Processes, network: Network, *, node: int, nodes: int) -> None:
        """On node `node` of `nodes`; `launcher` knows where this node begins its search for ports."""
        self.file = launcher.paths.engines(launcher.attempt)
        self._token_file = launcher.paths.engine_token
        self._limits = processes.engine
        self._host = network.address
        self._node, self._nodes = node, nodes
        self._seeds = itertools.count(launcher.port_seed)
        self._checked = time.monotonic()
        environment = cpu_environment(
            threads=processes.local.threads, processes=max(1, processes.engines), cores=available_cores()
        )

        def launch(index: int) -> tuple[Child, int]:
            (port,) = choose_ports(1, seed=next(self._seeds), host=network.address)
            arguments = ["--index", str(index), "--host", network.address, "--port", str(port)]
            return launcher.start(Command("engine", index, processes.engine_module, arguments, environment)), port

        self._launch = launch
        self._engines: list[_Engine] = []
        self._indices = processes.share(node, nodes).engines

    @property
    def came_up(self) -> bool:
        """Whether every engine has answered at least once."""
        return all(engine.came_up for engine in self._engines)

    def start(self) -> None:
        """Start all engines and say where they will be."""
        token = self._token_file.read_text().strip()
        for index in self._indices:
            self._engines.append(_Engine(index, self._launch, self._host, token))
        self._publish()

    def check(self) -> None:
        """Look after every engine. Raises EngineError for one that cannot be started, or died or hung too often."""
        now = time.monotonic()
        tick, self._checked = min(now - self._checked, _LONGEST_TICK), now
        for engine in self._engines:
            if engine.look(tick):
                log.info("%s is ready", engine.name)
                self._publish()
            problem = self._problem(engine)
            if problem is not None:
                self._start_again(engine, problem)

    def end(self, *, grace: float, hurry: Callable[[], bool]) -> None:
        """Ask all engines to end, kill those that have not within `grace` seconds or when `hurry()`."""
        for engine in self._engines:
            engine.health.end()
        # The one signal to which they listen: those of Slurm reach every process of a job.
        terminate([engine.child for engine in self._engines], grace=grace, hurry=hurry, number=signal.SIGINT)

    def _problem(self, engine: _Engine) -> MilesError | None:
        """Why an engine must be started again; None when it is well."""
        child, limits = engine.child, self._limits
        if child.exit_code() is not None:
            return child.failure() or EngineLost(child.death(), fix=child.whole_log())
        if engine.ready and engine.silence > limits.hang_timeout:
            return EngineLost(
                f"{child.name} (process {child.pid}) has not answered for {limits.hang_timeout:g} s\n"
                f"{child.end_of_log()}",
                fix="raise engine.hang_timeout if it was only busy",
            )
        if not engine.ready and engine.silence > limits.startup_timeout:
            return EngineError(
                f"{child.name} did not answer within {limits.startup_timeout:g} s\n{child.end_of_log()}",
                fix="raise engine.startup_timeout if it was still loading",
            )
        return None

    def _start_again(self, engine: _Engine, problem: MilesError) -> None:
        """Start an engine on another port, unless that was done too often. Raises EngineError, or what ended it."""
        if engine.lost_its_port and engine.ports_lost < PORT_TRIES - 1:
            engine.ports_lost += 1
            log.warning("another program took port %d of %s; it starts again on another", engine.port, engine.name)
        elif not engine.came_up or self._limits.max_restarts == 0:
            raise problem
        elif engine.restarts == self._limits.max_restarts:
            raise type(problem)(
                f"{engine.name} failed once more after {engine.restarts} restarts in this attempt "
                f"(engine.max_restarts = {self._limits.max_restarts}): {problem.message}",
                fix=problem.fix,
            )
        else:
            engine.restarts += 1
            log.warning(
                "%s starts again, for the %d. of at most %d times: %s",
                *(engine.name, engine.restarts, self._limits.max_restarts, problem.message),
            )
        engine.start_again()
        self._publish()

    def _publish(self) -> None:
        endpoints = [engine.endpoint for engine in self._engines]
        write_endpoints(self.file, endpoints, node=self._node, nodes=self._nodes)


class _Engine:
    """One engine: its process of now, and what became of earlier ones."""

    def __init__(self, index: int, launch: Callable[[int], tuple[Child, int]], host: str, token: str) -> None:
        self.index = index
        self.name = f"engine {index}"
        self.came_up = False
        """Whether any start of it has answered."""
        self.ready = False
        """Whether this start of it has answered."""
        self.silence = 0.0
        """Seconds without an answer, as far as anybody looked."""
        self.restarts = 0
        self.ports_lost = 0
        self._launch = launch
        self._host = host
        self._token = token
        self._starts = 0
        self._start()

    def start_again(self) -> None:
        """Kill what is left of the process and start another."""
        self.health.end()
        self.child.end()
        self._start()

    def look(self, tick: float) -> bool:
        """Notice whether it has answered since `tick` seconds ago; whether that was this start's first answer."""
        if not self.health.take_answer():
            self.silence += tick
            return False
        first, self.ready, self.came_up, self.silence = not self.ready, True, True, 0.0
        return first

    @property
    def lost_its_port(self) -> bool:
        """Whether it ended before it answered, and somebody listens on its port."""
        return not self.ready and self.child.exit_code() is not None and not is_free(self.port, self._host)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.index, f"http://{self._host}:{self.port}", self._starts, self.ready)

    def _start(self) -> None:
        self.child, self.port = self._launch(self.index)
        self.health = HealthWatch(self._host, self.port, self._token)
        self._starts += 1
        self.ready = False
        self.silence = 0.0
