"""A run on a real Slurm that torments it: python benchmarks/slurm_proofs.py --scenario tormented [--seed 1 2]

A cluster of four nodes is started on this host (tests/slurm/testbed.py). A small run is finished on two of them without
disturbance; others begin from its warm start, are submitted once, and are disturbed. Scenarios:

tormented   preempted three times, over its time limit once, put back into the queue once, and one of its nodes lost and
            back again, at random moments in random order: the result is that of the undisturbed run, bit for bit, and
            the ledger names every cause.
elastic     begun on two of "2-4" nodes, continued on four, on three after one was lost, and by hand on one: the global
            batch stays, the ledger says so, and the curve is that of the undisturbed run within rounding.
short-grace preempted where the grace is shorter than a save, and killed without any: no token is lost by the first, and
            by the second at most those of the flush interval.
old-attempt the `slurmd` of every node of a run is killed, so that the old attempt lives on, unsignalled, while the new
            one runs elsewhere: it ends by itself. Once more with the old attempt frozen until the run is done.
timings     what each way to be interrupted costs (benchmarks/slurm_timings.py).

Writes benchmarks/results/slurm-SCENARIO.json (timings: slurm-interruptions.json), with what is wrong: nothing, or the
exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from provenance import commit, machine  # noqa: E402
from slurm_timings import Interruption, Kind, interrupt, summary  # noqa: E402

from miles.runs.attempts import EndReason  # noqa: E402
from miles.runs.journal.show import show_steps  # noqa: E402
from miles.runs.metrics import read_metrics  # noqa: E402
from miles.runs.paths import RunPaths  # noqa: E402
from tests.chaos.audit import process_findings  # noqa: E402
from tests.chaos.run import STAGE, Case, kill, remains  # noqa: E402
from tests.slurm.testbed import Testbed  # noqa: E402
from tests.slurm.torment import (  # noqa: E402
    LEAD_MINUTES,
    SHORT_MINUTES,
    Blow,
    Torment,
    ledger,
    ledger_findings,
    new_steps,
    stage_attempts,
)
from tests.slurm.user import User, curve_distance, unsound  # noqa: E402

NODES = 2
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="tormented")
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, help="of the run: more on a faster machine")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--directory", type=Path, help="keep the cluster's and the runs' files there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the cluster must be ended
    name = "interruptions" if arguments.scenario == "timings" else arguments.scenario
    output = arguments.output or ROOT / "benchmarks" / "results" / f"slurm-{name}.json"
    with tempfile.TemporaryDirectory(prefix="slurm-") as temporary:
        directory = arguments.directory or Path(temporary)
        scenario, steps = SCENARIOS[arguments.scenario]
        records = scenario(directory, arguments.seed, arguments.steps or steps)
    output.write_text(json.dumps(records, indent=1).replace(f"{directory}/", "") + "\n")
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
def cluster(directory: Path, name: str = "cluster", **settings: Any) -> Iterator[Testbed]:
    """An idle cluster of four nodes, for as long as the block runs."""
    bed = Testbed(directory / name, **settings)
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
    return user, {
        "machine": machine(),
        "commit": commit(),
        "slurm": bed.run("sinfo", "--version"),
        "case": {"backend": "fsdp", "nodes": NODES, "steps": steps, **shape},
        "grace_seconds": bed.grace,
        "undisturbed_seconds": round(time.time() - began, 1),
    }


def after_steps(user: User, name: str, *, attempt: int, steps: int = 3) -> None:
    """Wait until an attempt of a run has made some steps."""
    paths = user.run(name)

    def made() -> bool:
        attempts = stage_attempts(paths)
        return bool(attempts) and attempts[-1].number >= attempt and new_steps(paths, attempts[-1]) >= steps

    user.until(made, f"attempt {attempt} makes no steps", name, seconds=600)


def end_of(user: User, name: str, seconds: float = 1800.0) -> None:
    """Wait until a run is done and its jobs are gone. Some versions of Slurm run a finished job once more."""
    done = user.run(name).done(STAGE)
    user.until(done.exists, f"run {name} does not end", name, seconds)
    user.until(lambda: not user.bed.run("squeue", "-h"), f"jobs of run {name} are left", name, seconds)


def elastic(directory: Path, seeds: list[int], steps: int) -> Record:
    """Proof that a run may go on with another number of nodes, by Slurm's choice and by the user's."""
    with cluster(directory, grace=10) as bed:
        user, document = undisturbed(directory, bed, steps)
        paths = user.fork("elastic", 'slurm.nodes="2-4"', "slurm.exclusive=true")
        others = bed.sbatch(
            "#!/bin/bash\nsleep 3600\n", "-o", "/dev/null", "-p", "high", "--exclusive", "-N2", "-w", "n3,n4"
        )
        bed.wait_state(others, "RUNNING")
        user.miles("resume", "elastic")
        job = user.job("elastic")
        after_steps(user, "elastic", attempt=1)
        bed.run("scancel", others)
        bed.preempt(job)
        after_steps(user, "elastic", attempt=2)
        bed.kill_node("n4")
        after_steps(user, "elastic", attempt=3)
        user.miles("stop", "elastic")
        user.miles("resume", "elastic", "--set", "slurm.nodes=1")
        end_of(user, "elastic")
        bed.start_node("n4")
    sizes = [len(attempt["nodes"]) for attempt in ledger(paths)]
    findings = unsound(paths)
    if sizes != [2, 4, 3, 1]:
        findings.append(f"the attempts had {sizes} nodes")
    reasons = [attempt["reason"] for attempt in ledger(paths)]
    if reasons != ["preempted", "node-failure", "stopped", "finished"]:
        findings.append(f"the ledger says {reasons}")
    groups = {row.trained for row in show_steps(paths, STAGE)}
    if len(groups) != 1:
        findings.append(f"steps have different numbers of groups: {groups}")
    run = {"ledger": ledger(paths), "groups_per_step": groups.pop(), "findings": findings}
    return document | {"runs": [run | {"distance": curve_distance(paths, user.run())}]}


def short_grace(directory: Path, seeds: list[int], steps: int) -> Record:
    """Proof that a preemption loses nothing when there is no time to save, and a kill at most the flush interval."""
    runs: list[Record] = []
    with cluster(directory, grace=0, kill_wait=2) as bed:
        # Saves are rare, so that only the journal can have what was drawn since.
        user, document = undisturbed(directory, bed, steps, checkpoint_every=10, hidden_size=256)
        for seed in seeds:
            name = f"seed-{seed}"
            paths = user.fork(name)
            user.miles("resume", name)
            kinds = [Kind.TERM, Kind.TERM, Kind.KILL, Kind.KILL]
            found = [asdict(each) for each in interrupt_all(user, name, kinds, random.Random(seed))]
            end_of(user, name)
            runs.append({"seed": seed, "interruptions": found, "ledger": ledger(paths)})
            runs[-1] |= {"tokens_per_second": tokens_per_second(paths), "findings": user.settled(paths)}
    return document | {"flush_seconds": Case().flush_seconds, "runs": runs}


def tokens_per_second(paths: RunPaths) -> float:
    """Of generation, over the steps that were made without an interruption."""
    seconds = [line.values["time/generate"] for line in read_metrics(paths) if line.stage == STAGE and line.step > 0]
    tokens = [row.tokens for row in show_steps(paths, STAGE)]
    return round(statistics.median(tokens) / statistics.median(seconds), 1)


def old_attempt(directory: Path, seeds: list[int], steps: int) -> Record:
    """Proof that an attempt on nodes that were given up changes nothing any more."""
    with cluster(directory) as bed:
        user, document = undisturbed(directory, bed, steps)
        document["runs"] = []
        for name in ("live", "frozen"):
            document["runs"].append(one_old_attempt(user, name, frozen=name == "frozen"))
            print(json.dumps(document["runs"][-1], indent=1), flush=True)
    return document


def one_old_attempt(user: User, name: str, *, frozen: bool) -> Record:
    """Kill the slurmd of every node of an attempt; `frozen`: and stop its processes until the run is done."""
    paths, bed = user.fork(name), user.bed
    user.miles("resume", name)
    after_steps(user, name, attempt=1)
    (old,) = stage_attempts(paths)
    assert old.place is not None
    for node in old.place.nodes:
        bed.kill_node(node)
    old_processes = list(remains(paths))
    for pid in old_processes if frozen else []:
        kill(pid, signal.SIGSTOP)
    user.until(lambda: len(stage_attempts(paths)) > 1, "no new attempt comes", name)
    lived_on = sorted(remains(paths).keys() & set(old_processes))
    began = time.time()
    if not frozen:
        user.until(lambda: not remains(paths).keys() & set(old_processes), "the old attempt does not end", name)
    ended = time.time()
    end_of(user, name)
    before = tree(paths)
    for pid in lived_on if frozen else []:
        kill(pid, signal.SIGCONT)
    findings = process_findings(paths)
    after = tree(paths)
    changed = sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
    output = paths.slurm_log(STAGE, old.place.job)
    own = (f"logs/attempt-{old.number:03d}/", f"logs/{output.name}", f"allocations/{old.place.job}-0.json", "claims/")
    findings += [f"the old attempt changed {file}" for file in changed if not file.startswith(own)]
    logs = [output, *sorted(paths.logs(old.number).glob("*.log"))]
    words = [
        f"{log.name}: {line}"
        for log in logs
        for line in log.read_text(errors="replace").splitlines()
        if "a newer attempt drives run" in line
    ]
    if not words:
        findings.append("the old attempt does not say why it ended")
    # Frozen, nobody is left to write what Slurm says into the job's output.
    reasons = [attempt.reason for attempt in stage_attempts(paths)]
    if reasons != [EndReason.KILLED if frozen else EndReason.NODE_FAILURE, EndReason.FINISHED]:
        findings.append(f"the ledger says {reasons}")
    for node in old.place.nodes:
        bed.start_node(node)
    bed.reset()
    return {
        "frozen": frozen,
        "processes_that_lived_on": len(lived_on),
        "seconds_until_they_ended": None if frozen else round(ended - began, 1),
        "files_of_the_run": len(after),
        "changed_after_the_run_was_done": changed,
        "its_words": words,
        "ledger": ledger(paths),
        "findings": findings + user.settled(paths),
    }


def tree(paths: RunPaths) -> dict[str, str]:
    """Checksums of all files of a run, by name below its directory."""
    files = (file for file in paths.root.rglob("*") if file.is_file() and not file.is_symlink())
    return {str(file.relative_to(paths.root)): xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in files}


def timings(directory: Path, seeds: list[int], steps: int) -> Record:
    """What each way to be interrupted costs; each is measured once for every seed."""
    rounds, dice = len(seeds), random.Random(seeds[0])
    with cluster(directory, grace=20) as bed:
        user, document = undisturbed(directory, bed, steps)
        usual = interruptions(user, "usual", [Kind.TERM, Kind.KILL, Kind.NODE, Kind.REQUEUE] * rounds, dice)
        limit = (f'slurm.time="{SHORT_MINUTES}"', f"slurm.save_lead_minutes={LEAD_MINUTES}")
        limits = interruptions(user, "limits", [Kind.LIMIT] * rounds, dice, *limit)
    with cluster(directory, name="user-signal", grace=20, send_user_signal=True) as bed:
        warned = interruptions(User(user.directory, bed), "warned", [Kind.USR1] * rounds, dice)
    found = [*usual, *limits, *warned]
    tokens = round(statistics.mean(row.tokens for row in show_steps(user.run("usual"), STAGE) if row.decided))
    document |= {"flush_seconds": Case().flush_seconds, "kinds": summary(found, tokens)}
    return document | {"interruptions": [asdict(each) for each in found], "runs": []}


def interruptions(user: User, name: str, kinds: list[Kind], dice: random.Random, *overrides: str) -> list[Interruption]:
    """Interrupt a run without end in these ways, in random order, and stop it."""
    user.fork(name, f"steps.{STAGE}.train.steps=10000", *overrides)
    user.miles("resume", name)
    found = interrupt_all(user, name, kinds, dice)
    user.miles("stop", name)
    return found


def interrupt_all(user: User, name: str, kinds: list[Kind], dice: random.Random) -> list[Interruption]:
    found, on_disk = [], 0
    for kind in dice.sample(kinds, len(kinds)):
        interruption, on_disk = interrupt(user, name, kind, on_disk=on_disk, dice=dice)
        found.append(interruption)
        print(interruption, flush=True)
    return found


SCENARIOS: dict[str, tuple[Callable[[Path, list[int], int], Record], int]] = {
    "tormented": (tormented, 120),
    "elastic": (elastic, 30),
    "short-grace": (short_grace, 24),
    "old-attempt": (old_attempt, 40),
    "timings": (timings, 4),
}
"""Each with the steps of its run, so that everything happens before its end."""

if __name__ == "__main__":
    main()
