"""One stage of a run, started again and again from the same point, without the processes around it.

Owns what a supervisor does for a stage, as far as a proof needs it: opening it, an engine, a rank, the environment. The
whole of it, in processes of their own, is `tests.chaos.run`.
"""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from miles.cluster.cpu import rank_environment
from miles.cluster.health import answers
from miles.cluster.ports import LOOPBACK, choose_ports
from miles.config.load import load_resolved, load_run
from miles.runs.directory import create_run
from miles.runs.endpoints import ENGINES_VARIABLE, Endpoint, write_endpoints
from miles.runs.failures import FAILURE_VARIABLE, read_failure
from miles.runs.paths import RunPaths
from miles.workflow.done import write_done
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.stage import open_stage
from tests.chaos.nursery import Nursery
from tests.chaos.run import Case

START_SECONDS = 120.0


@dataclass(slots=True)
class Stage:
    """One stage of one run directory; `work`, outside of it, gets logs."""

    paths: RunPaths
    name: str
    nursery: Nursery
    work: Path
    attempt: int = 0

    def run(self) -> int:
        """Open the stage and run it on one rank to its end; returns the exit code, negative for a signal."""
        self.attempt += 1
        planned = self._planned()
        open_stage(self.paths, planned)
        engine = self._start_engine() if planned.kind == "rl" else None
        try:
            code = self.nursery.wait(self._start_rank())
        finally:
            if engine is not None:
                self.nursery.end(engine)
        if code == 0:
            write_done(self.paths, self.name, planned.inputs, attempt=self.attempt, finished=time.time(), seconds=0.0)
        return code

    def message(self) -> str:
        """The error that ended the last rank, and its log."""
        return f"{read_failure(self._failure)}\n{self.log.read_text(errors='replace')}"

    @property
    def log(self) -> Path:
        """Log of the last rank."""
        return self.work / f"rank-{self.attempt}.log"

    @property
    def _failure(self) -> Path:
        return self.work / f"failure-{self.attempt}.json"

    @property
    def _engines(self) -> Path:
        return self.work / f"engines-{self.attempt}.json"

    @property
    def _arguments(self) -> list[str]:
        return ["--run-dir", str(self.paths.root), "--step", self.name]

    def _planned(self) -> PlannedStep:
        return next(step for step in plan_run(load_resolved(self.paths.root), self.paths) if step.name == self.name)

    def _start_rank(self) -> int:
        self.log.unlink(missing_ok=True)
        (port,) = choose_ports(1, seed=random.getrandbits(32))
        environment = rank_environment(
            0, local_ranks=range(1), world=1, address=LOOPBACK, port=port, interface="lo"
        ) | {
            "MILES_ATTEMPT": str(self.attempt),
            ENGINES_VARIABLE: str(self._engines),
            FAILURE_VARIABLE: str(self._failure),
        }
        return self.nursery.start("miles.training.worker", self._arguments, environment, self.log)

    def _start_engine(self) -> int:
        (port,) = choose_ports(1, seed=random.getrandbits(32))
        arguments = [*self._arguments, "--index", "0", "--port", str(port)]
        log = self.work / f"engine-{self.attempt}.log"
        engine = self.nursery.start("miles.engines.serve", arguments, {}, log)
        token = self.paths.engine_token.read_text().strip()
        deadline = time.monotonic() + START_SECONDS
        while not answers(LOOPBACK, port, token, "/health"):
            if time.monotonic() > deadline:
                self.nursery.end(engine)
                raise TimeoutError(f"the engine does not answer\n{log.read_text()}")
            time.sleep(0.05)
        write_endpoints(self._engines, [Endpoint(0, f"http://{LOOPBACK}:{port}", start=1, ready=True)])
        return engine


def prepare(case: Case, directory: Path, *, until: str, nursery: Nursery) -> RunPaths:
    """A run of which every stage before `until` is done."""
    paths = create_run(load_run(case.write(directory)))
    for planned in plan_run(load_resolved(paths.root), paths):
        if planned.name == until:
            break
        if planned.kind in ("sft", "rl"):
            stage = Stage(paths, planned.name, nursery, directory)
            assert stage.run() == 0, stage.message()
        else:
            arguments = ["--run-dir", str(paths.root), "--step", planned.name]
            log = directory / f"{planned.name}.log"
            code = nursery.wait(nursery.start("miles.workflow.run_step", arguments, {}, log))
            assert code == 0, log.read_text()
            write_done(paths, planned.name, planned.inputs, attempt=1, finished=time.time(), seconds=0.0)
    return paths


def copy_run(paths: RunPaths, target: RunPaths) -> RunPaths:
    """Replace a run directory by a copy of another."""
    shutil.rmtree(target.root, ignore_errors=True)
    shutil.copytree(paths.root, target.root, symlinks=True)
    return target
