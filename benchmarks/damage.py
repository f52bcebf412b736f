"""Damaged files and disks that refuse: python benchmarks/damage.py [--backend fsdp]

A stage of reinforcement learning of a small run (tests/chaos) is killed when its newest checkpoint is of step 4 and its
journal holds step 5 and most of step 6. Then every file of that checkpoint and of the journal after it is truncated,
has a bit flipped, is emptied and is removed in turn; the stage is continued, and compared with the undisturbed one.
After that, the stage is run while the disk refuses changes to checkpoints, or to the journal, from some change on, with
ENOSPC, EDQUOT, EIO, ESTALE and EROFS. tests/chaos/refusals.py says what must happen then.
Writes benchmarks/results/damage-BACKEND.json.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from provenance import commit, machine  # noqa: E402

from tests.chaos.damage import DAMAGES, Survival, needed_files, survive  # noqa: E402
from tests.chaos.refusals import CHECKPOINTS, JOURNAL, REFUSALS, Refusal, refuse_journal, refuse_saves  # noqa: E402
from tests.chaos.rehearsal import Rehearsal, rehearse  # noqa: E402
from tests.chaos.run import STAGE, Case  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["megatron", "fsdp"], default="megatron")
    arguments = parser.parse_args()
    output = ROOT / "benchmarks" / "results" / f"damage-{arguments.backend}.json"
    case = Case(arguments.backend, partial=True, steps=6, checkpoint_every=2, eval_every=0, flush_seconds=0.05)
    with tempfile.TemporaryDirectory() as directory, rehearse(case, STAGE, Path(directory)) as stage:
        survivals = damages(stage)
        refusals = disks(stage)
    findings = sum(bool(each.findings) for each in (*survivals, *refusals))
    output.write_text(json.dumps(document(str(case), survivals, refusals), indent=1) + "\n")
    print(f"{len(survivals)} damages, {len(refusals)} refusals, {findings} with findings; written to {output}")
    sys.exit(findings > 0)


def damages(stage: Rehearsal) -> list[Survival]:
    """Every file, damaged in every way."""
    midway = stage.midway("/step-000006/batch-")
    survivals = []
    for file in needed_files(midway, STAGE):
        for damage in DAMAGES:
            survivals.append(survive(stage, midway, file, damage))
            print(f"{file}, {damage}: {len(survivals[-1].findings)} findings", flush=True)
            for finding in survivals[-1].findings:
                print(f"  {finding}", flush=True)
    return survivals


def disks(stage: Rehearsal) -> list[Refusal]:
    """Every errno, on everything of a kind, and on each change from one on."""
    refusals = []
    saves = sum(CHECKPOINTS in str(change.path) for change in stage.changes)
    journal = sum(JOURNAL in str(change.path) for change in stage.changes)
    for number in REFUSALS:
        for first in (1, saves // 3, saves // 2):
            refusals.append(refuse_saves(stage, number, first=first))
            said(refusals[-1])
    for first in range(1, journal + 1, max(1, journal // 20)):
        refusals.append(refuse_journal(stage, REFUSALS[first % len(REFUSALS)], first=first))
        said(refusals[-1])
    return refusals


def said(refusal: Refusal) -> None:
    print(f"{refusal.error} at {refusal.part} from {refusal.first}: {len(refusal.findings)} findings", flush=True)
    for finding in refusal.findings:
        print(f"  {finding}", flush=True)


def document(case: str, survivals: list[Survival], refusals: list[Refusal]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "commit": commit(),
        "case": case,
        "damaged_files": len({survival.file for survival in survivals}),
        "damages": len(survivals),
        "damages_survived": sum(not survival.findings for survival in survivals),
        "refusals": len(refusals),
        "refusals_as_documented": sum(not refusal.findings for refusal in refusals),
        "errnos": [errno.errorcode[number] for number in REFUSALS],
        "records": [asdict(each) for each in (*survivals, *refusals)],
    }


if __name__ == "__main__":
    main()
