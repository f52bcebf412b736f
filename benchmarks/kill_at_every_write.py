"""A stage killed at each of its writes: python benchmarks/kill_at_every_write.py [--backend fsdp] [--stage grpo]

A stage of a small run (tests/chaos) is begun, killed in place of its N-th change to a file of the run directory, done
again and compared with the undisturbed one; N goes from 1 to the number of changes. Of a write, also half is written.
A library between the program and the C library counts and kills (tests/chaos/disk_shim.c): opens that create or cut,
writes, flushes, renames, links, removals. Changes of the supervised stage `warmup` are those of checkpoints, metrics,
progress and the model; reinforcement learning, `grpo`, adds the journal.

Of many writes to one file in a row, the first, a half of the middle one and the last are taken, and of the rewrites of
progress.json, which nothing reads back, every seventh change; `--every` takes all.
Writes benchmarks/results/kill-at-every-write-BACKEND-STAGE.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from provenance import commit, machine  # noqa: E402

from tests.chaos.rehearsal import rehearse  # noqa: E402
from tests.chaos.run import STAGE, WARMUP, Case  # noqa: E402
from tests.chaos.shim import Change  # noqa: E402
from tests.chaos.sweep import Death, deaths, die_at  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["megatron", "fsdp"], default="megatron")
    parser.add_argument("--stage", choices=[WARMUP, STAGE], default=STAGE)
    parser.add_argument("--every", action="store_true", help="also each of many writes to one file in a row")
    parser.add_argument("--sample", type=int, help="only that many, spread over all")
    parser.add_argument("--parallel", type=int, default=1, help="stages at once, each with its share of the deaths")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    name = f"kill-at-every-write-{arguments.backend}-{arguments.stage}.json"
    output = arguments.output or ROOT / "benchmarks" / "results" / name
    case = Case(arguments.backend, partial=True, steps=2, checkpoint_every=1, eval_every=2, flush_seconds=0.2)
    changes: list[Change] = []
    died: list[Death] = []
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(arguments.parallel) as pool:
        step = max(1, arguments.parallel)
        shares = [
            pool.submit(
                sweep,
                case,
                arguments.stage,
                Path(directory) / str(n),
                slice(n, None, step),
                arguments.sample,
                arguments.every,
            )
            for n in range(step)
        ]
        for share in as_completed(shares):
            changes, deaths = share.result()
            died += deaths
            output.write_text(json.dumps(document(case, arguments.stage, changes, died), indent=1) + "\n")
    print(f"written to {output}")
    sys.exit(any(death.findings for death in died))


def sweep(
    case: Case, name: str, directory: Path, share: slice, sample: int | None, every: bool
) -> tuple[list[Change], list[Death]]:
    """One death after another, of this process's share of them; and what the undisturbed stage changes."""
    with rehearse(case, name, directory) as stage:
        chosen = deaths(stage.changes, every=every)
        if sample is not None:
            chosen = chosen[:: max(1, len(chosen) // sample)]
        died = []
        for change, torn in chosen[share]:
            died.append(die_at(stage, change, torn=torn))
            where = f"{died[-1].change}{', half' if torn else ''}"
            print(f"{change.number} of {len(stage.changes)}: {where}: {len(died[-1].findings)} findings", flush=True)
            for finding in died[-1].findings:
                print(f"  {finding}", flush=True)
        return stage.changes, died


def document(case: Case, name: str, changes: list[Change], died: list[Death]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "commit": commit(),
        "case": str(case),
        "stage": name,
        "changes": len(changes),
        "changes_by_name": dict(Counter(change.name for change in changes)),
        "deaths": len(died),
        "deaths_in_the_middle_of_a_write": sum(death.torn for death in died),
        "same_result": sum(not death.findings for death in died),
        "records": [asdict(death) for death in sorted(died, key=lambda death: (death.number, death.torn))],
    }


if __name__ == "__main__":
    main()
