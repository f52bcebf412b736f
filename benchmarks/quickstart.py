"""The quickstart over several seeds: python benchmarks/quickstart.py [--seeds 5]

Submits workflows/quickstart.toml as a user does, once per seed, in a temporary directory. Records the held-out
evaluation before the first and after the last reinforcement-learning step, the wall time of the whole command, and
the largest memory that all its processes held together (sum of proportional set sizes, sampled).
Writes benchmarks/results/quickstart.json after each seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from provenance import commit, machine

from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.json"
STAGE = "grpo"
SAMPLE_SECONDS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as directory:
            runs.append(run(seed, Path(directory)))
        print(json.dumps(runs[-1]), flush=True)
        arguments.output.write_text(json.dumps(document(runs), indent=2) + "\n")


def document(runs: list[dict]) -> dict:
    mean = {key: statistics.mean(run[key] for run in runs) for key in ("before", "after", "seconds")}
    return {"machine": machine(), "commit": commit(), "mean": mean, "runs": runs}


def run(seed: int, directory: Path) -> dict:
    """Submit once; reward is pass@1, since the reward is 0 or 1."""
    command = [sys.executable, "-m", "miles", "submit", str(ROOT / "workflows" / "quickstart.toml"), "--local"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--set", f"seed={seed}"], cwd=directory, env=environment, stdout=log, stderr=log
        )
        peak = peak_memory(process)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit((directory / "log").read_text())
    lines = [line for line in read_metrics(RunPaths(directory / "runs" / "quickstart")) if line.stage == STAGE]
    evaluations = {line.step: line.values for line in lines if "eval/reward" in line.values}
    first, last = evaluations[0], evaluations[max(evaluations)]
    return {
        "seed": seed,
        "before": first["eval/reward"],
        "after": last["eval/reward"],
        "pass@4_before": first["eval/pass@4"],
        "pass@4_after": last["eval/pass@4"],
        "curve": {step: values["eval/reward"] for step, values in evaluations.items()},
        "mismatch_mean": statistics.mean(
            line.values["mismatch/log_prob_abs_diff_mean"] for line in lines if line.step > 0
        ),
        "mismatch_max": max(line.values["mismatch/log_prob_abs_diff_max"] for line in lines if line.step > 0),
        "seconds": round(seconds, 1),
        "step_seconds_median": statistics.median(line.values["time/step"] for line in lines if line.step > 0),
        "peak_memory_mib": round(peak / 2**20),
    }


def peak_memory(process: subprocess.Popen) -> int:
    """Largest memory in bytes of the process and all it started, until it ends."""
    peak = 0
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += each.memory_full_info().pss
        peak = max(peak, total)
        time.sleep(SAMPLE_SECONDS)
    return peak


if __name__ == "__main__":
    main()
