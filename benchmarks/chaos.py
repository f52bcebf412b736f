"""Runs that are killed again and again: python benchmarks/chaos.py [--kills 20] [--backend fsdp] [--partial]

A small run (tests/chaos/run.py: a few supervised steps, then a dozen of reinforcement learning) is done once without
disturbance. Then the same run file is submitted again and again while its processes are killed at random moments,
until it ends; after that its result is compared with the undisturbed one, bit for bit (tests/chaos/audit.py), and the
next run begins with other moments. Writes benchmarks/results/chaos-CASE.json after each run.

`seconds_to_first_token`: from the start of the continuing command to the first new file in the rollout journal, which
is at most journal.flush_seconds (0.5) after the token itself; of commands that had to generate.
`seconds_to_first_step`: to the first new line of metrics.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from provenance import commit, machine  # noqa: E402

from tests.chaos.audit import LOG_FINDING, audit  # noqa: E402
from tests.chaos.kills import Kind, Life, Plan, torment  # noqa: E402
from tests.chaos.run import Case, Undisturbed, finish, paths_of  # noqa: E402
from tests.chaos.shim import Shim  # noqa: E402

KILLS_PER_RUN = 12
"""After that a run is left to end; about as many as it takes to reach every part of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many in all")
    parser.add_argument("--backend", choices=["megatron", "fsdp"], default="megatron")
    parser.add_argument("--partial", action="store_true", help="over-sampling, partial rollouts, dropped groups")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, each with about two busy cores")
    parser.add_argument("--keep", type=Path, help="work in this directory, and leave the runs there")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    case = Case(arguments.backend, arguments.partial, arguments.ranks, arguments.engines)
    output = arguments.output or ROOT / "benchmarks" / "results" / f"chaos-{str(case).replace(' ', '-')}.json"
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="miles-chaos-"))
    runs = prove(case, directory, arguments.kills, arguments.seed, arguments.parallel, output)
    if arguments.keep is None:
        shutil.rmtree(directory)
    print(f"written to {output}")
    sys.exit(any(run["findings"] for run in runs))


def prove(case: Case, directory: Path, kills: int, seed: int, parallel: int, output: Path) -> list[dict[str, Any]]:
    """Run after run, `parallel` at a time, until `kills` are delivered."""
    reference = finish(case.write(directory / "undisturbed"))
    print(f"{case}: undisturbed in {reference.seconds:.1f} s", flush=True)
    runs: list[dict[str, Any]] = []
    seeds = itertools.count(seed)

    def delivered() -> int:
        return sum(len(run["kills"]) for run in runs)

    def work() -> None:
        while (missing := kills - delivered()) > 0:
            number = next(seeds)
            run = one_run(case, directory / f"run-{number}", reference, number, missing)
            runs.append(run)
            output.write_text(json.dumps(document(case, reference.seconds, runs), indent=1) + "\n")
            counts = ", ".join(f"{count} {kind}" for kind, count in Counter(k["kind"] for k in run["kills"]).items())
            print(
                f"run {number}: {counts}; {len(run['findings'])} findings; {delivered()} of {kills} kills", flush=True
            )
            for finding in run["findings"]:
                print(f"  {finding}", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        for worker in [pool.submit(work) for _ in range(parallel)]:
            worker.result()
    return runs


def one_run(case: Case, directory: Path, reference: Undisturbed, seed: int, most: int) -> dict[str, Any]:
    """One run, killed up to `most` times, and what is wrong with its result."""
    file = case.write(directory)
    shim = Shim(directory / "shim", paths_of(file).root)
    lives = torment(file, Plan(seed, reference.seconds), shim=shim, max_kills=min(most, KILLS_PER_RUN))
    findings = audit(paths_of(file), reference.paths)
    if not findings:
        shutil.rmtree(paths_of(file).root)
    return {
        "seed": seed,
        "findings": findings,
        "kills": [asdict(kill) for life in lives for kill in life.kills],
        "submits": [
            {"seconds": life.seconds, "exit_code": life.exit_code, **recovery(life, previous)}
            for life, previous in zip(lives, [None, *lives], strict=False)
        ],
    }


def recovery(life: Life, previous: Life | None) -> dict[str, Any]:
    """How long the command that continues after a kill took to be where it was."""
    return {
        "after": previous.ended_by if previous else None,
        "first_token_seconds": life.first_token_seconds,
        "first_step_seconds": life.first_step_seconds,
    }


def document(case: Case, seconds: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = Counter(kill["kind"] for run in runs for kill in run["kills"])
    submits = [submit for run in runs for submit in run["submits"] if submit["after"]]
    return {
        "machine": machine(),
        "commit": commit(),
        "case": str(case),
        "undisturbed_seconds": round(seconds, 1),
        "kills": sum(kinds.values()),
        "kills_by_kind": {kind.value: kinds[kind] for kind in Kind},
        "kills_by_phase": dict(Counter(f"{k['stage']} {k['phase']}".strip() for run in runs for k in run["kills"])),
        "continued_by_command": len(submits),
        "seconds_to_first_token": spread(submits, "first_token_seconds"),
        "seconds_to_first_step": spread(submits, "first_step_seconds"),
        "runs": len(runs),
        "runs_bit_identical": sum(all(f.startswith(LOG_FINDING) for f in run["findings"]) for run in runs),
        "runs_with_a_traceback_in_a_log": sum(bool(run["findings"]) for run in runs),
        "records": runs,
    }


def spread(submits: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Median, least and most."""
    values = [submit[name] for submit in submits if submit[name] is not None]
    if not values:
        return {}
    figures = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {"count": len(values), **{key: round(value, 2) for key, value in figures.items()}}


if __name__ == "__main__":
    main()
