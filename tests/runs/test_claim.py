import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles.errors import RunError
from miles.runs.claim import CLAIM_VARIABLE, Claim, Fence, Overtaken, current_holder, refuse_if_held
from miles.runs.paths import RunPaths

HOLD = """
import sys, time
from pathlib import Path
from miles.runs.claim import Claim
from miles.runs.paths import RunPaths
with Claim.acquire(RunPaths(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""

RACE = """
import sys, time
from pathlib import Path
from miles.errors import RunError
from miles.runs.claim import Claim
from miles.runs.paths import RunPaths
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.001)
try:
    Claim.acquire(RunPaths(Path(sys.argv[1])))
    print("won", flush=True)
    sys.stdin.read()
except RunError:
    print("lost", flush=True)
"""


def _start(script: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _holder(directory: Path) -> subprocess.Popen[str]:
    process = _start(HOLD, directory)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_refused_with_who_and_since_when(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    process = _holder(tmp_path)
    with pytest.raises(RunError, match=rf"in use by process {process.pid} on .*, since 20"):
        Claim.acquire(paths)
    with pytest.raises(RunError, match="in use"):
        refuse_if_held(paths)
    holder = current_holder(paths)
    assert holder is not None
    assert holder.identity.pid == process.pid
    process.communicate("")
    assert current_holder(paths) is None
    Claim.acquire(paths).release()


def test_claim_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Claim.acquire(RunPaths(tmp_path)) as claim:
        assert claim.previous is not None
        assert claim.previous.identity.pid == process.pid


def test_claim_of_a_reused_pid_is_taken_over(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    Claim.acquire(paths)
    file = max(paths.claims.iterdir())
    record = json.loads(file.read_text())
    record["process"]["started"] -= 3600.0
    file.write_text(json.dumps(record))
    Claim.acquire(paths).release()


def test_claim_of_another_host_stands_and_says_which_file_to_remove(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    Claim.acquire(paths)
    file = max(paths.claims.iterdir())
    record = json.loads(file.read_text())
    record["process"]["host"] = "node017"
    file.write_text(json.dumps(record))
    with pytest.raises(RunError, match="node017") as caught:
        Claim.acquire(paths)
    assert str(file) in str(caught.value.fix)
    file.unlink()
    Claim.acquire(paths).release()


def test_exactly_one_of_many_claimants_wins_a_dead_processes_claim(tmp_path: Path) -> None:
    dead = _holder(tmp_path)
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    racers = [_start(RACE, tmp_path) for _ in range(4)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    words = []
    for racer in racers:
        assert racer.stdout is not None
        words.append(racer.stdout.readline())
    for racer in racers:
        racer.communicate("")
    assert sorted(words) == ["lost\n"] * 3 + ["won\n"]
    assert not list((tmp_path / "claims").glob(".*"))


def test_fence_lets_the_newest_attempt_pass_and_stops_the_ones_before(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with Claim.acquire(paths) as first:
        old = Fence(paths, first.number)
        old.check()
    old.check()  # released, and nobody took the run since
    with Claim.acquire(paths) as second:
        assert second.number == first.number + 1
        Fence(paths, second.number).check()
        with pytest.raises(
            Overtaken, match=r"a newer attempt drives run .* \(claim 2, this one's is 1\); this one ends"
        ):
            old.check()


def test_fence_stops_an_attempt_whose_claim_was_removed_even_if_its_number_is_given_out_again(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    lost = Claim.acquire(paths)
    fence = Fence(paths, lost.number)
    (tmp_path / "claims/000001.json").unlink()
    with pytest.raises(Overtaken):
        fence.check()
    with Claim.acquire(paths) as newer:
        assert newer.number == lost.number
        with pytest.raises(Overtaken):
            fence.check()
        Fence(paths, newer.number).check()


def test_fence_of_a_claim_that_is_gone_already_stops(tmp_path: Path) -> None:
    with pytest.raises(Overtaken):
        Fence(RunPaths(tmp_path), 1).check()


def test_fence_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(tmp_path)
    for _ in range(2):
        Claim.acquire(paths).release()
    monkeypatch.delenv(CLAIM_VARIABLE, raising=False)
    Fence.from_environment(paths).check()
    monkeypatch.setenv(CLAIM_VARIABLE, "1")
    with pytest.raises(Overtaken):
        Fence.from_environment(paths).check()
    monkeypatch.setenv(CLAIM_VARIABLE, "2")
    Fence.from_environment(paths).check()


@pytest.mark.parametrize(
    ("job", "restart", "live", "allowed"),
    [
        (12, 1, {12}, True),  # a later run of the same job
        (12, 0, {12}, False),
        (13, 0, {12, 13}, False),
        (13, 0, {13}, True),  # the holder's job has ended
        (13, 0, None, False),
        (None, 0, set(), True),
        (None, 0, {12}, False),
    ],
)
def test_claim_of_a_job_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: int | None, restart: int, live: set[int] | None, allowed: bool
) -> None:
    paths = RunPaths(tmp_path)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    Claim.acquire(paths, job=12, restart=0)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    if allowed:
        claim = Claim.acquire(paths, job=job, restart=restart, live_jobs=live)
        assert claim.number == 2
        assert claim.previous is not None
        assert (claim.previous.job, claim.previous.identity.node) == (12, "n1")
    else:
        with pytest.raises(RunError, match=r"on n1 in job 12"):
            Claim.acquire(paths, job=job, restart=restart, live_jobs=live)
