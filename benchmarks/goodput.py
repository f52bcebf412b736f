"""Goodput over a simulated week of preemptions: python benchmarks/goodput.py [--seeds 10]

What part of the allocated time ends up in training steps, each counted once: Miles, against saves at a fixed interval
without a journal, which is what other systems do. Every policy meets the same interruptions and has the same costs:

journal + auto        Miles as it is: the journal, saves by cost, and a last save where the grace allows
auto, no journal      the same without its journal: what the journal alone is worth
every 10, on signal   saves every 10 steps and before it leaves
best N, on signal     the same every N steps, with the N that was best for these very weeks: known afterwards only
every 10, every 20    restarts from the last checkpoint

10 and 20 are what examples of others save at (NeMo-RL: examples/configs/grpo_math_1B.yaml, save_period 10; slime:
--save-interval 20 in its scripts). All of them save in the background and start again by themselves.

Interruptions are independent and memoryless: preemptions, and node failures at the published rate of Llama 3 405B (419
unexpected interruptions in 54 days on 16,384 GPUs, 8 to a node). A time limit ends each allocation at the latest.
Waits in the queue are not allocated, so they do not count here.

Sizes of jobs are in `jobs`, each with where its figures come from: the small run of `resume_cost.py` is measured; of
large ones only the seconds of a step are published, the rest are ASSUMPTIONS, named as such in the result.
Writes benchmarks/results/goodput-week.json. The simulation: goodput_simulation.py.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from goodput_simulation import Allocation, Cause, Job, Outcome, Policy, simulate  # noqa: E402
from provenance import commit, machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
HOUR = 3600.0
DAY = 24 * HOUR
WEEK = 7 * DAY
NODE_FAILURES_PER_NODE_DAY = 419 / (54 * 16384 / 8)
PREEMPTION_HOURS = (1.0, 3.0, 8.0, math.inf)
"""Mean hours between preemptions; infinity: none."""
LIMIT_HOURS = (4.0, 24.0)
GRACE_SECONDS = (30.0, 300.0)
"""KillWait where a partition has no GraceTime, and a generous GraceTime."""
LEAD_SECONDS = 300.0
"""`slurm.save_lead_minutes` where nobody has set it."""
QUEUE_SECONDS = 600.0
"""Mean wait in the queue; it only shortens the week."""
JOURNALED = "journal + auto"
INTERVALS = (1, 2, 3, 5, 10, 20, 50)
"""Training steps between saves, among which `best N` is."""


def _saving(every: int) -> Policy:
    return Policy(f"every {every}, on signal", journal=False, listens=True, every=every)


POLICIES = (
    Policy(JOURNALED, journal=True, listens=True, every=None),
    Policy("auto, no journal", journal=False, listens=True, every=None),
    _saving(10),
    Policy("every 10", journal=False, listens=False, every=10),
    Policy("every 20", journal=False, listens=False, every=20),
)

BYTES_PER_PARAMETER = 14
"""bf16 weights, float32 master weights and both moments of Adam."""
FLUSH_SECONDS = 5.0
"""`journal.flush_seconds` where nobody has set it; a kill also takes the part of a response that is being asked for,
which is about as long."""
STALL_PART = 6.3 / 148.8
"""Of a save, how much stalls training: PyTorch's published figures for its asynchronous checkpoints of 7B."""


@dataclass(frozen=True, slots=True)
class Size:
    """A job of some size, and where its figures come from."""

    name: str
    nodes: int
    job: Job
    sources: dict[str, str]
    quick: bool = False
    """Days of one kind instead of weeks of all: a week of short steps takes long to simulate."""


def large(name: str, *, billions: float, nodes: int, step: float, published: str, gb_per_second: float) -> Size:
    """A job on nodes of eight GPUs. 70 % of a step is generation."""
    save = billions * BYTES_PER_PARAMETER / gb_per_second
    start = 300.0 + save
    job = Job(0.7 * step, 0.3 * step, start, save, STALL_PART * save, lost_by_kill=2 * FLUSH_SECONDS)
    sources = {
        "step": published,
        "generate": "ASSUMPTION: 70 % of a step",
        "save": f"ASSUMPTION: {BYTES_PER_PARAMETER} bytes per parameter at {gb_per_second:g} GB/s",
        "stall": "ratio of PyTorch's published asynchronous checkpoints, 6.3 of 148.8 s for 7B",
        "startup": "ASSUMPTION: 300 s for container, imports, engines and their graphs; and reading the checkpoint as"
        " fast as it is written",
        "lost_by_kill": "the default of journal.flush_seconds, twice: the interval, and a request of its length",
    }
    return Size(name, nodes, job, sources)


def small() -> Size:
    """The run that was measured, on one node without a GPU."""
    cost = json.loads((RESULTS / "resume-cost-megatron.json").read_text())
    slurm = json.loads((RESULTS / "slurm-interruptions.json").read_text())
    background, foreground = cost["save_stall"]
    step = background["step_seconds_median"]
    kinds = slurm["kinds"].values()
    tokens_per_step = statistics.median(kind["tokens_per_step"] for kind in kinds)
    kills = [kind["tokens_lost"] for name, kind in cost["by_kind"].items() if "kill -9" in name]
    lost = statistics.mean(kills) / tokens_per_step * 0.7 * step
    startup = statistics.median(kind["start_to_first_token_seconds"]["median"] for kind in kinds)
    job = Job(
        generate=0.7 * step,
        train=0.3 * step,
        startup=startup,
        save=foreground["stall_seconds_median"],
        stall=background["stall_seconds_median"],
        lost_by_kill=lost,
    )
    return Size(
        "tiny mixture of experts, measured",
        nodes=2,
        job=job,
        sources={
            "step": "measured: resume-cost-megatron.json, save_stall",
            "generate": "ASSUMPTION: 70 % of a step, as in runs of slurm-tormented.json",
            "save": "measured: a save in the foreground, resume-cost-megatron.json",
            "stall": "measured: a save in the background, resume-cost-megatron.json",
            "startup": "measured: median of slurm-interruptions.json, on two busy cores",
            "lost_by_kill": "measured: mean tokens lost by kill -9, resume-cost-megatron.json",
        },
        quick=True,
    )


NEMO = "published: NeMo-RL, GRPO on H100, on-policy"


def jobs() -> list[Size]:
    """The jobs that are compared."""
    return [
        small(),
        large("8B", billions=8, nodes=2, step=60.0, published="ASSUMPTION", gb_per_second=5),
        large("30B-A3B", billions=30, nodes=4, step=192.0, published=NEMO, gb_per_second=5),
        large("30B-A3B, one node", billions=30, nodes=1, step=768.0, published=f"4 x {NEMO}", gb_per_second=5),
        large("235B-A22B", billions=235, nodes=16, step=395.0, published=NEMO, gb_per_second=20),
    ]


def week(
    dice: random.Random,
    *,
    nodes: int,
    preemption_hours: float,
    limit_hours: float,
    grace: float,
    seconds: float = WEEK,
) -> list[Allocation]:
    """The allocations of a week or of `seconds`, whoever uses them."""
    failures_per_second = nodes * NODE_FAILURES_PER_NODE_DAY / 86400
    found, now = list[Allocation](), 0.0
    while True:
        now += dice.expovariate(1 / QUEUE_SECONDS)
        preempted = dice.expovariate(1 / (HOUR * preemption_hours)) if math.isfinite(preemption_hours) else math.inf
        failed = dice.expovariate(failures_per_second)
        limit = HOUR * limit_hours
        if failed <= min(preempted + grace, limit):
            allocation = Allocation(now, math.inf if failed < preempted else preempted, failed, Cause.NODE_FAILURE)
        elif preempted <= limit:
            allocation = Allocation(now, preempted, preempted + grace, Cause.PREEMPTED)
        else:
            allocation = Allocation(now, limit - LEAD_SECONDS, limit, Cause.TIME_LIMIT)
        if now >= seconds:
            return found
        if now + allocation.killed >= seconds:
            return [*found, Allocation(now, math.inf, seconds - now, Cause.WEEK_OVER)]
        found.append(allocation)
        now += allocation.killed


def compare(size: Size, seeds: int, **trace: float) -> dict[str, Any]:
    """All policies through the same weeks."""
    dice = [random.Random(f"{size.name} {trace} {seed}") for seed in range(seeds)]
    seconds = DAY if size.quick else WEEK
    weeks = [week(each, nodes=size.nodes, seconds=seconds, **trace) for each in dice]
    runs = {policy.name: [simulate(size.job, policy, each) for each in weeks] for policy in POLICIES}
    fixed = {every: [simulate(size.job, _saving(every), each) for each in weeks] for every in INTERVALS}
    best = max(INTERVALS, key=lambda every: _goodput(fixed[every]))
    runs["best N, on signal"] = fixed[best]
    interruptions = statistics.mean(sum(a.cause is not Cause.WEEK_OVER for a in allocations) for allocations in weeks)
    return {
        "job": size.name,
        **_finite(trace),
        "seeds": seeds,
        "interruptions": interruptions,
        "best_n": best,
        "policies": {name: _row(outcomes, runs[JOURNALED]) for name, outcomes in runs.items()},
    }


def _row(outcomes: list[Outcome], journaled: list[Outcome]) -> dict[str, float]:
    """Means over the weeks, as parts of the allocated time, and by how much it is ahead of Miles in single weeks."""
    ahead = [this.goodput - miles.goodput for this, miles in zip(outcomes, journaled, strict=True)]
    lost = ("startup", "saving", "generated_again", "trained_again")
    parts = {name: statistics.mean(getattr(each, name) / each.allocated for each in outcomes) for name in lost}
    row = {"goodput": _goodput(outcomes), "ahead_least": min(ahead), "ahead_most": max(ahead), **parts}
    return {name: round(value, 4) for name, value in row.items()}


def _goodput(outcomes: list[Outcome]) -> float:
    return statistics.mean(outcome.goodput for outcome in outcomes)


def comparisons(seeds: int) -> Iterator[dict[str, Any]]:
    for size in jobs():
        for hours in PREEMPTION_HOURS:
            for limit in LIMIT_HOURS:
                for grace in GRACE_SECONDS:
                    if not size.quick or (limit, grace) == (LIMIT_HOURS[0], GRACE_SECONDS[0]):
                        yield compare(size, seeds, preemption_hours=hours, limit_hours=limit, grace=grace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="weeks of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS / "goodput-week.json")
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        "what": "simulated; what is measured and what is assumed is said with each job",
        "machine": machine(),
        "commit": commit(),
        "jobs": [asdict(size) for size in jobs()],
        "policies": [asdict(policy) for policy in POLICIES],
        "node_failures_per_1000_node_days": round(1000 * NODE_FAILURES_PER_NODE_DAY, 2),
        "lead_seconds": LEAD_SECONDS,
        "weeks": [],
    }
    for row in comparisons(arguments.seeds):
        document["weeks"].append(row)
        print(line(row), flush=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {arguments.output}")


def line(row: dict[str, Any]) -> str:
    """A row of the table, in percent."""
    often = "never" if row["preemption_hours"] is None else f"{row['preemption_hours']:g} h"
    head = f"{row['job']:34} {often:>6} {row['limit_hours']:4g} h {row['grace']:4g} s"
    return " ".join([head, *(f"{100 * policy['goodput']:6.1f}" for policy in row["policies"].values())])


def _finite(trace: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in trace.items()}


if __name__ == "__main__":
    main()
