"""A run on a real Slurm that torments it: python benchmarks/slurm_proofs.py --scenario tormented [--seed 1 2]

A cluster of four nodes is started on this host (tests/slurm/testbed.py). A small run is finished on two of them without
disturbance; others begin from its warm start, are submitted once, and are disturbed. Scenarios:

tormented   preempted three times, over its time limit once, put back into the queue once, and one of its nodes lost and
            back again, at random moments in random order: the result is that of the undisturbed run, bit for bit, and
            the ledger names every cause.

Writes benchmarks/results/slurm-SCENARIO.json, with what is wrong (nothing, or the exit code is 1).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agreement import machine  # noqa: E402

from tests.chaos.run import STAGE, Case  # noqa: E402
from tests.slurm.testbed import Testbed  # noqa: E402
from tests.slurm.torment import SHORT_MINUTES, Blow, Torment, ledger, ledger_findings  # noqa: E402
from tests.slurm.user import User  # noqa: E402

NODES = 2
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="tormented")
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=120, help="of the run: more on a faster machine")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--directory", type=Path, help="keep the cluster's and the runs' files there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the cluster must be ended
    output = arguments.output or ROOT / "benchmarks" / "results" / f"slurm-{arguments.scenario}.json"
    with tempfile.TemporaryDirectory(prefix="slurm-") as temporary:
        records = SCENARIOS[arguments.scenario](arguments.directory or Path(temporary), arguments.seed, arguments.steps)
    output.write_text(json.dumps(records, indent=1) + "\n")
    print(f"written to {output}")
    sys.exit(any(run["findings"] for run in records["runs"]))


def tormented(directory: Path, seeds: list[int], steps: int) -> Record:
    """Proof that nothing is lost, whatever the cluster does to a run that was submitted once."""
    with cluster(directory, grace=10) as bed:
        user, document = undisturbed(directory, bed, steps)
        document |= {"time_limit_minutes": SHORT_MINUTES, "runs": []}
        for seed in seeds:
            document["runs"].append(one_torment(user, seed))
            print(json.dumps(document["runs"][-1], indent=1), flush=True)
    return document


def one_torment(user: User, seed: int) -> Record:
    name = f"seed-{seed}"
    torment = Torment(user, name, [Blow.PREEMPT] * 3 + [Blow.LIMIT, Blow.NODE, Blow.REQUEUE], seed)
    paths = user.fork(name, *torment.overrides())
    began = time.time()
    user.miles("resume", name)
    torment.strike_all()
    end_of(user, name)
    return {
        "seed": seed,
        "seconds": round(time.time() - began, 1),
        "blows": [asdict(struck) for struck in torment.struck],
        "ledger": ledger(paths),
        "findings": [*user.settled(paths), *ledger_findings(paths, torment.struck)],
    }


@contextmanager
def cluster(directory: Path, **settings: Any) -> Iterator[Testbed]:
    """An idle cluster of four nodes, for as long as the block runs."""
    bed = Testbed(directory / "cluster", **settings)
    bed.up()
    try:
        yield bed
    finally:
        bed.down()


def undisturbed(directory: Path, bed: Testbed, steps: int, *overrides: str, **case: Any) -> tuple[User, Record]:
    """A user with a run that nothing happened to, and the head of the document about what happens to others."""
    user = User(directory / "user", bed)
    user.directory.mkdir()
    shape = {"checkpoint_every": 5, "eval_every": 0, "hidden_size": 64} | case
    file = user.write(Case("fsdp", steps=steps, **shape))
    began = time.time()
    sets = [f"slurm.nodes={NODES}", *overrides]
    user.miles("submit", str(file), *[word for override in sets for word in ("--set", override)])
    end_of(user, "proof")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return user, {
        "machine": machine(),
        "commit": commit.stdout.strip(),
        "slurm": bed.run("sinfo", "--version"),
        "case": {"backend": "fsdp", "nodes": NODES, "steps": steps, **shape},
        "grace_seconds": bed.grace,
        "undisturbed_seconds": round(time.time() - began, 1),
    }


def end_of(user: User, name: str, seconds: float = 1800.0) -> None:
    """Wait until a run is done and its jobs are gone. Some versions of Slurm run a finished job once more."""
    done = user.run(name).done(STAGE)
    user.until(done.exists, f"run {name} does not end", name, seconds)
    user.until(lambda: not user.bed.run("squeue", "-h"), f"jobs of run {name} are left", name, seconds)


SCENARIOS: dict[str, Callable[[Path, list[int], int], Record]] = {"tormented": tormented}

if __name__ == "__main__":
    main()
