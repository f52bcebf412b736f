"""One node of a Slurm job: `python -m miles.cluster.node --run-dir D --step NAME`, started on each by srun.

Node 0 is the head: it claims the run, begins the attempt and decides how it ends. Owns how the head and the others come
together; what they supervise belongs to `miles.cluster.supervisor`. Exit codes are those of docs/cli.md, and 75 for a
step that is not done and goes on in another job or run of this one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from miles.cluster.signals import StopSignal


def main() -> None:
    stop = StopSignal(patient=True)
    stop.listen()
    # Only now: a signal that comes while modules are loaded must not kill a job that would then not be requeued.
    from miles.cluster.allocation import Allocation
    from miles.cluster.nodes import run_node
    from miles.cluster.supervisor import log_to_stderr
    from miles.runs.paths import RunPaths

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", required=True)
    arguments = parser.parse_args()
    log_to_stderr()
    paths = RunPaths(arguments.run_dir.absolute())
    try:
        sys.exit(run_node(paths, arguments.step, Allocation.from_environment(os.environ), stop))
    finally:
        stop.ignore()


if __name__ == "__main__":
    from miles.runs.failures import exit_with_failures

    exit_with_failures(main)
