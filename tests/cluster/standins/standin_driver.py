"""The supervisor's process with stand-in workers and engines: RUN_DIR STEP RANKS ENGINES LOCAL_SECTION ENGINE_SECTION.

The sections are JSON.
"""

import sys
from pathlib import Path

from miles.cluster.signals import StopSignal
from miles.cluster.supervisor import log_to_stderr, supervise
from miles.config.load import load_resolved
from miles.config.schema import EngineSection, LocalSection
from miles.runs.claim import Claim
from miles.runs.failures import exit_with_failures
from miles.runs.paths import RunPaths
from miles.workflow.kinds import Processes
from miles.workflow.plan import plan_run


def main() -> None:
    run_dir, step, ranks, engines, local, engine = sys.argv[1:]
    log_to_stderr()
    stop = StopSignal()
    stop.listen()
    paths = RunPaths(Path(run_dir))
    with Claim.acquire(paths) as claim:
        plan = plan_run(load_resolved(paths.root), paths)
        planned = next(planned for planned in plan if planned.name == step)
        processes = Processes(
            "standin_worker",
            "trainer",
            int(ranks),
            int(engines),
            "standin_engine",
            LocalSection.model_validate_json(local),
            EngineSection.model_validate_json(engine),
        )
        supervise(paths, planned, processes, stop, claim)


exit_with_failures(main)
