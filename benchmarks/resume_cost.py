"""What a save and a kill cost: python benchmarks/resume_cost.py [--backend fsdp] [--rounds 2]

1. The stall of a training step by a save, in the background and in the foreground (`time/save` of the metrics), for a
   model of a few megabytes.
2. A run that saves every fifth step is killed in a step between two saves, in each way. How many of the tokens that
   the engine had drawn in its life are not on the disk; seconds from the start of the command that continues to the
   first new token and until the run is further than it was. Then the same run directory, as it was after the kill, is
   continued without its journal: what a system has that saves at fixed intervals and keeps no rollouts.

Tokens drawn are the engine's own count, asked just before the kill; those that it drew since then are not in it. Tokens
on the disk are those of the journal (or of its steps up to the checkpoint). Those of the evaluation before the first
step are taken off; there are no others. A negative loss means that the run still drew tokens after it was asked to
stop, or that the engine restarted by itself: then nothing is lost.
Writes benchmarks/results/resume-cost-BACKEND.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from provenance import commit, machine  # noqa: E402

from miles.runs.attempts import read_attempts  # noqa: E402
from miles.runs.endpoints import read_endpoints  # noqa: E402
from miles.runs.journal.show import show_steps  # noqa: E402
from miles.runs.metrics import read_metrics  # noqa: E402
from miles.runs.paths import RunPaths  # noqa: E402
from tests.chaos.kills import SIGNALS, Kind, Life, watch  # noqa: E402
from tests.chaos.run import (  # noqa: E402  # noqa: E402
    HELDOUT_PROMPTS,
    STAGE,
    Case,
    Submit,
    finish,
    kill,
    last_step,
    paths_of,
    processes,
    wait_for_step,
)

EVERY = 5
KINDS = (Kind.RANK, Kind.ENGINE, Kind.DRIVER, Kind.ALL, Kind.TERM)
VICTIM = {Kind.RANK: "trainer", Kind.ENGINE: "engine"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["megatron", "fsdp"], default="megatron")
    parser.add_argument("--rounds", type=int, default=2, help="kills of each kind")
    arguments = parser.parse_args()
    output = ROOT / "benchmarks" / "results" / f"resume-cost-{arguments.backend}.json"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        stalls = [save_stall(arguments.backend, directory, asynchronous=way) for way in (True, False)]
        print(json.dumps(stalls), flush=True)
        kills = []
        for round_ in range(arguments.rounds):
            for kind in KINDS:
                kills.append(one_kill(arguments.backend, kind, directory / f"{kind.name}-{round_}", seed=round_))
                print(json.dumps(kills[-1]), flush=True)
    document = {"machine": machine(), "commit": commit(), "backend": arguments.backend}
    document |= {"checkpoint_every": EVERY, "flush_seconds": Case().flush_seconds, "save_stall": stalls}
    document |= {"by_kind": {kind: summary([k for k in kills if k["kind"] == kind]) for kind in KINDS}, "kills": kills}
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {output}")


def save_stall(backend: str, directory: Path, *, asynchronous: bool) -> dict[str, Any]:
    """Seconds that steps with a save wait for it, against what the step takes."""
    case = Case(backend, steps=5, checkpoint_every=1, eval_every=0, hidden_size=256, asynchronous=asynchronous)
    file = case.write(directory / f"stall-{asynchronous}")
    finish(file)
    paths = paths_of(file)
    lines = [line.values for line in read_metrics(paths) if line.stage == STAGE and "time/save" in line.values]
    newest = max(paths.checkpoints(STAGE).glob("step-*"))
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return {
        "asynchronous": asynchronous,
        "checkpoint_mib": round(size / 2**20, 1),
        "stall_seconds_median": round(statistics.median(values["time/save"] for values in lines), 4),
        "step_seconds_median": round(statistics.median(values["time/step"] for values in lines), 3),
    }


def one_kill(backend: str, kind: Kind, directory: Path, *, seed: int) -> dict[str, Any]:
    """Kill a run once, between two saves; continue it with its journal, and a copy of it without."""
    file = Case(backend, steps=EVERY + 8, checkpoint_every=EVERY, eval_every=0).write(directory)
    paths = paths_of(file)
    submit = Submit(file)
    wait_for_step(submit, EVERY + 2)
    time.sleep(random.Random(f"{kind} {seed}").uniform(0.0, 2.0))
    drawn = tokens_drawn(paths)
    running = processes(paths)
    victim = next(pid for pid, role in running.items() if role == VICTIM.get(kind, "driver"))
    for pid in [submit.process.pid, *running] if kind is Kind.ALL else [victim]:
        kill(pid, SIGNALS.get(kind, signal.SIGKILL))
    record: dict[str, Any] = {"kind": kind, "step": last_step(paths) + 1, "tokens_drawn": drawn}
    if kind is Kind.ENGINE:
        # The run goes on by itself; what the engine had answered is on the disk when it was flushed.
        time.sleep(2 * Case().flush_seconds)
        record["tokens_lost"] = drawn - tokens_on_disk(paths)
        assert submit.wait() == 0, submit.output()
        return record
    submit.wait()
    copy = directory / "without-journal"
    shutil.copytree(paths.root, copy, symlinks=True)
    checkpoint = max(int(path.name[5:]) for path in paths.checkpoints(STAGE).glob("step-*"))
    record["tokens_lost"] = drawn - tokens_on_disk(paths)
    record["tokens_lost_without_journal"] = drawn - tokens_on_disk(paths, until=checkpoint)
    record |= go_on(file, record["step"])
    shutil.rmtree(paths.root)
    copy.rename(paths.root)
    shutil.rmtree(paths.journal(STAGE))
    record |= {f"{name}_without_journal": value for name, value in go_on(file, record["step"]).items()}
    return record


def go_on(file: Path, step: int) -> dict[str, float]:
    """Continue by the same command; seconds to the first new token on the disk, and to the metrics of `step`."""
    submit = Submit(file)
    life = Life(submit.started)
    watch(submit, life, until=submit.started + 600)
    assert submit.wait() == 0, submit.output()
    times = {line.step: line.time for line in read_metrics(submit.paths) if line.stage == STAGE}
    assert life.first_token_seconds is not None
    return {"seconds_to_first_token": life.first_token_seconds, "seconds_to_new_step": times[step] - submit.started}


def tokens_drawn(paths: RunPaths) -> int:
    """Tokens that the engines of the running attempt have drawn, without those of the first evaluation."""
    return tokens_of_engines(paths, read_attempts(paths)[-1].number) - tokens_evaluated(paths)


def tokens_of_engines(paths: RunPaths, attempt: int) -> int:
    """Tokens that the engines of an attempt have drawn, for whatever. Raises OSError when one does not answer."""
    total = 0
    token = paths.engine_token.read_text().strip()
    for endpoint in read_endpoints(paths.engines(attempt)):
        request = urllib.request.Request(f"{endpoint.url}/server_info", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            total += json.load(answer)["internal_states"][0]["num_drawn_tokens"]
    return total


def tokens_evaluated(paths: RunPaths) -> int:
    """Tokens of the evaluation before the first step."""
    first = next(line for line in read_metrics(paths) if line.stage == STAGE)
    return round(first.values["eval/length_mean"] * HELDOUT_PROMPTS)


def tokens_on_disk(paths: RunPaths, until: int | None = None) -> int:
    """Response tokens in the journal; only of steps up to `until`."""
    return sum(row.tokens for row in show_steps(paths, STAGE) if until is None or row.step <= until)


def summary(kills: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every figure."""
    names = [name for name in kills[0] if name not in ("kind", "step")]
    return {name: round(statistics.mean(kill[name] for kill in kills), 2) for name in names}


if __name__ == "__main__":
    main()
