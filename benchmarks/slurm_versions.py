"""What Slurm's versions do differently, on the one that is installed: python benchmarks/slurm_versions.py [PART ...]

Parts, all of them by default:

tests     the tests of tests/slurm that meet Slurm's decisions: preemption with and without a warning to the batch
          script, requeue, a finished job that is run again, chain, stop, commands, batch script
torment   a run that is preempted, over its time limit, loses its node and is put back into the queue: the result is
          that of the undisturbed run, bit for bit, and the ledger names every cause

Puts them under the version of Slurm into benchmarks/results/slurm-versions.json, in place of what is there. The exit
code is 1 when anything is wrong. Another version: tests/slurm/other_versions.sh SUITE ROOT python ....
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from provenance import commit, machine  # noqa: E402
from slurm_proofs import cluster, end_of, undisturbed  # noqa: E402

from tests.slurm.torment import Blow, Torment, ledger, ledger_findings  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "slurm-versions.json"
TESTS = ("test_testbed.py", "test_commands.py", "test_batch_job.py", "test_submit.py")
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="of the tormented run: more on a faster machine")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="of the tests, those that pytest takes by this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]
    wrong = False
    for part in arguments.part or PARTS:
        began = time.time()
        record = PARTS[part](arguments)
        head = {"commit": commit(), "machine": machine(), "seconds": round(time.time() - began)}
        results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        results.setdefault(version, {})[part] = head | record
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        wrong |= bool(record["findings"])
        print(f"Slurm {version}, {part}: {record['findings'] or 'as it must be'}", flush=True)
    sys.exit(wrong)


def tests(arguments: argparse.Namespace) -> Record:
    """Outcome of each test."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        files = [str(ROOT / "tests" / "slurm" / name) for name in TESTS]
        options = [
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            "-v",
            *(["-k", arguments.k] if arguments.k else []),
        ]
        subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env=os.environ | {"CI": "1"})
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}": case[0].tag if len(case) else "passed"
        for case in cases
    }
    return {"outcomes": outcomes, "findings": [name for name, outcome in outcomes.items() if outcome != "passed"]}


def torment(arguments: argparse.Namespace) -> Record:
    """A run of one node that meets every kind of blow once."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory, cluster(Path(directory), grace=10) as bed:
        user, document = undisturbed(Path(directory), bed, arguments.steps, "slurm.nodes=1")
        blows = Torment(user, "struck", list(Blow), arguments.seed)
        paths = user.fork("struck", *blows.overrides())
        user.miles("resume", "struck")
        blows.strike_all()
        end_of(user, "struck")
        return {
            "case": document["case"] | {"nodes": 1},
            "blows": [asdict(struck) for struck in blows.struck],
            "restarts": int(bed.show(user.job("struck"))["Restarts"]),
            "ledger": ledger(paths),
            "findings": [*user.settled(paths), *ledger_findings(paths, blows.struck)],
        }


PARTS: dict[str, Callable[[argparse.Namespace], Record]] = {"tests": tests, "torment": torment}

if __name__ == "__main__":
    main()
