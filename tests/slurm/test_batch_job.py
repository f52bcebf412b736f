"""The batch script on a real Slurm, with a stand-in for the supervisor: what nodes are told, quoting, signals, requeue.

`tests/cluster/slurm/test_batch_script.py` has more cases, with stand-ins for Slurm.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.render import check_script, render_job
from miles.cluster.slurm.spec import JobSpec
from miles.config.cluster import SlurmSection
from slurm.testbed import Testbed, wait_text

NODE = """
import json, os, signal, sys, time
restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
def log(**entry):
    with open(sys.argv[1] + "/seen", "a") as file:
        file.write(json.dumps({"restart": restart, "node": os.environ["SLURMD_NODENAME"], **entry}) + "\\n")
def hear(number, frame):
    log(heard=signal.Signals(number).name)
    sys.exit(75)
for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), hear)
log(environment=dict(os.environ), argv=sys.argv[2:])
if restart >= int(sys.argv[2]):
    sys.exit(0)
time.sleep(120)
"""


def job(
    directory: Path, *, restarts: int = 1, nodes: str = "1", words: tuple[str, ...] = (), **section: Any
) -> JobSpec:
    """A job whose supervisors end well in the run with that many restarts, and wait for a signal in those before."""
    (directory / "logs").mkdir(parents=True)
    return JobSpec(
        run="demo",
        step="grpo",
        run_dir=directory,
        section=SlurmSection(**({"time": "10"} | section)),
        command=(sys.executable, "-c", NODE, str(directory), str(restarts), *words),
        needs_ranks=True,
        environment={"GIVEN": "a 'b' $(c)"},
        output=directory / "logs" / "slurm-grpo-%j.out",
        nodes=nodes,
        dependency=None,
    )


def submit(spec: JobSpec) -> int:
    script = spec.run_dir / "job.sbatch"
    text = render_job(spec)
    check_script(text)
    script.write_text(text)
    return Slurm().submit(script)


def seen(directory: Path) -> list[dict[str, Any]]:
    file = directory / "seen"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_begun(directory: Path, restart: int, nodes: int = 1) -> None:
    deadline = time.monotonic() + 60
    while sum("argv" in entry and entry["restart"] == restart for entry in seen(directory)) < nodes:
        assert time.monotonic() < deadline, seen(directory)
        time.sleep(0.05)


def heard(directory: Path) -> list[tuple[int, str]]:
    return [(entry["restart"], entry["node"]) for entry in seen(directory) if "heard" in entry]


HOSTILE = "a \"q\" $(touch PWNED) `touch PWNED` 's' back\\slash # %j --uid=0 ;&|"


def test_two_nodes_are_told_where_they_are_and_get_every_word_as_it_is(
    slurm: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NOT_LISTED", "x")
    directory = tmp_path / "a b 100%j"
    spec = job(directory, restarts=0, nodes="2", words=(HOSTILE,), exclusive=True, extra={"comment": HOSTILE})
    number = submit(spec)
    slurm.wait_state(number, "COMPLETED")
    entries = seen(directory)
    assert sorted(entry["node"] for entry in entries) == ["n1", "n2"]
    for entry in entries:
        told = entry["environment"]
        assert entry["argv"] == ["0", HOSTILE]
        assert told["MILES_HOSTS"] == "n1,n2"
        assert float(told["MILES_GRACE"]) > 0
        assert told["MILES_LIVE_JOBS"] == str(number)
        assert 500 < float(told["MILES_JOB_END"]) - time.time() < 600
        assert told["GIVEN"] == "a 'b' $(c)"
        assert told["HF_TOKEN"] == "secret"
        assert "NOT_LISTED" not in told
    shown = slurm.run("scontrol", "-o", "show", "job", number)
    assert f"Comment={HOSTILE} " in shown
    assert "JobName=demo.grpo " in shown
    assert (directory / "logs" / f"slurm-grpo-{number}.out").exists()
    assert not list(tmp_path.rglob("PWNED"))
    assert "secret" not in (directory / "job.sbatch").read_text()


def test_a_preempted_job_comes_back_and_finishes(slurm: Testbed, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    number = submit(job(directory, nodes="2", exclusive=True, partition="low"))
    wait_begun(directory, 0, nodes=2)
    slurm.preempt(number)
    slurm.wait_state(number, "COMPLETED", restarts=1)
    assert {node for restart, node in heard(directory) if restart == 0} == {"n1", "n2"}


def test_the_signal_before_the_time_limit_reaches_every_node(slurm: Testbed, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    number = submit(job(directory, nodes="2", exclusive=True))
    wait_begun(directory, 0, nodes=2)
    slurm.run("scancel", "--batch", "--signal=USR1", number)  # as --signal=B:USR1@... does
    slurm.wait_state(number, "COMPLETED", restarts=1)
    assert {node for restart, node in heard(directory) if restart == 0} == {"n1", "n2"}
    assert all(entry["heard"] == "SIGUSR2" for entry in seen(directory) if "heard" in entry)


def test_a_cancelled_job_stays_cancelled(slurm: Testbed, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    number = submit(job(directory))
    wait_begun(directory, 0)
    slurm.run("scancel", number)
    slurm.wait_state(number, "CANCELLED")
    wait_text(directory / "logs" / f"slurm-grpo-{number}.out", "Slurm is ending this job already")
    assert slurm.show(number)["Restarts"] == "0"
    assert heard(directory)


def test_a_job_that_may_not_be_requeued_leaves_it_to_its_successor(slurm: Testbed, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    number = submit(job(directory, restart="chain"))
    wait_begun(directory, 0)
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    state = slurm.wait_state(number, "FAILED", "CANCELLED", "COMPLETED")
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "75:0")
