"""One node of a job with stand-in workers and engines: RUN_DIR STEP RANKS ENGINES SILENCE_SECONDS.

Where the node stands is in its environment, as for `miles.cluster.node`.
"""

import os
import sys
from pathlib import Path

from miles.cluster.allocation import Allocation
from miles.cluster.nodes import run_node
from miles.cluster.peers import Timing
from miles.cluster.signals import StopSignal
from miles.cluster.supervisor import log_to_stderr
from miles.config.schema import EngineSection, LocalSection
from miles.runs.failures import exit_with_failures
from miles.runs.paths import RunPaths
from miles.workflow.kinds import AnyStep, Processes


def main() -> None:
    run_dir, step, ranks, engines, silence = sys.argv[1:]

    def standins(step: AnyStep) -> Processes:
        sections = LocalSection(), EngineSection()
        return Processes("standin_worker", "trainer", int(ranks), int(engines), "standin_engine", *sections)

    stop = StopSignal(patient=True)
    stop.listen()
    log_to_stderr()
    timing = Timing(beat=0.3, silence=float(silence), arrival=30.0, look=0.1)
    allocation = Allocation.from_environment(os.environ)
    try:
        sys.exit(run_node(RunPaths(Path(run_dir)), step, allocation, stop, timing=timing, processes=standins))
    finally:
        stop.ignore()


exit_with_failures(main)
