"""Stands in for a trainer rank where the real one cannot be made to misbehave: STANDIN_WORKER says how."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from miles.errors import DataError, Interrupted, PortTaken, RunError
from miles.runs.endpoints import read_endpoints
from miles.runs.failures import exit_with_failures
from miles.runs.metrics import MetricsWriter
from miles.runs.parent import end_with_parent
from miles.runs.paths import RunPaths

parser = argparse.ArgumentParser()
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--step")
arguments = parser.parse_args()
paths = RunPaths(arguments.run_dir)
behaviour = os.environ["STANDIN_WORKER"]
rank = int(os.environ["RANK"])
asked: list[int] = []


def remember(number: int, frame: FrameType | None) -> None:
    asked.append(number)


def main() -> None:
    output = paths.step(arguments.step)
    output.mkdir(parents=True, exist_ok=True)
    (paths.root / f"began-{rank}").touch()
    if behaviour == "succeed":
        while not all(endpoint.ready for endpoint in read_endpoints(Path(os.environ["MILES_ENGINES_FILE"]))):
            time.sleep(0.02)
        (output / f"rank-{rank}.json").write_text(json.dumps(dict(os.environ)))
    elif behaviour == "fail" and rank == 1:
        print("the last word of rank 1", flush=True)
        sys.exit(7)
    elif behaviour == "robbed":
        meet()
        (output / f"rank-{rank}.json").write_text(json.dumps(dict(os.environ)))
    elif behaviour == "explain" and rank == 1:
        raise DataError("prompt 17 is longer than the context", fix="set data.too_long")
    elif behaviour == "punctual":
        time.sleep(rank)  # each rank has its own to finish
        raise Interrupted("stopped before step 2 of 9")
    else:
        wait()


def meet() -> None:
    """The first port where the ranks are to meet is taken: rank 0 says so, the others wait there for ever."""
    robbed, port = paths.root / "robbed", os.environ["MASTER_PORT"]
    if rank == 0 and not robbed.exists():
        robbed.write_text(port)
        raise PortTaken("the trainer ranks cannot meet")
    while not robbed.exists() or robbed.read_text() == port:
        time.sleep(0.02)


def wait() -> None:
    """Wait to be told to stop.

    `obey` ends at the boundary, `finish` ends well, `full` cannot save, `deaf` never ends, even without a supervisor.
    """
    if behaviour != "deaf":
        end_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, remember)
    grandchild = subprocess.Popen(["sleep", "600"])
    MetricsWriter(paths).write(arguments.step, 1, {"loss": 1.0})
    Path(arguments.run_dir, f"waiting-{rank}").write_text(f"{os.getpid()} {grandchild.pid}")
    while not asked or behaviour == "deaf":
        time.sleep(0.05)
    if behaviour == "full":
        raise RunError("the disk is full")
    if behaviour == "obey":
        raise Interrupted("stopped before step 2 of 9")


exit_with_failures(main)
