"""The supervisor's process with stand-in workers and engines: RUN_DIR STEP RANKS ENGINES STARTUP_TIMEOUT."""

import sys
from pathlib import Path

from miles.cluster.processes import end_leftovers
from miles.cluster.signals import StopSignal
from miles.cluster.supervisor import log_to_stderr, supervise
from miles.config.load import load_resolved
from miles.config.schema import LocalSection
from miles.runs.claim import Claim
from miles.runs.failures import exit_with_failures
from miles.runs.paths import RunPaths
from miles.workflow.kinds import Processes
from miles.workflow.plan import plan_run


def main() -> None:
    run_dir, step, ranks, engines, timeout = sys.argv[1:]
    log_to_stderr()
    stop = StopSignal()
    stop.listen()
    paths = RunPaths(Path(run_dir))
    with Claim.acquire(paths):
        end_leftovers(paths)
        plan = plan_run(load_resolved(paths.root), paths)
        planned = next(planned for planned in plan if planned.name == step)
        processes = Processes(
            "standin_worker",
            "trainer",
            int(ranks),
            int(engines),
            "standin_engine",
            LocalSection(),
            float(timeout),
        )
        supervise(paths, planned, processes, stop)


exit_with_failures(main)
