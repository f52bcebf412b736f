"""Ranks and supervisors that are killed on a real Slurm, by a lack of memory or as the kernel kills for it.

What the budget of attempts bounds: a run that gets further goes on, one that dies at once on every start stops and
says of what.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from miles.cluster.slurm.jobs import read_jobs
from miles.runs.attempts import EndReason, read_attempts
from slurm.short_run import STAGE, write_short_run
from slurm.testbed import Testbed
from slurm.user import User
from tests.chaos.audit import process_findings
from tests.chaos.run import last_step, processes

pytestmark = pytest.mark.timeout(1500)
SLURMS_WORDS = "slurmstepd: error: Detected 1 oom_kill event in StepId={job}.0.\n"
"""As Slurm writes them where a cgroup bounds the memory, which takes more rights than a test has."""


def test_a_run_that_dies_at_once_on_every_start_stops_and_says_of_what(slurm: Testbed, tmp_path: Path) -> None:
    user = User(tmp_path, slurm)
    user.miles("submit", str(write_short_run(tmp_path, steps=2, setup='["ulimit -v 700000"]')))
    job = user.job()
    user.until_state("failed")
    state = slurm.wait_state(job, "FAILED", restarts=2)
    assert (state["Restarts"], state["ExitCode"]) == ("2", "4:0"), "two attempts, and one look at the budget"
    assert user.reasons(stage=STAGE) == [EndReason.OUT_OF_MEMORY] * 2
    told = user.miles("explain", "proof")
    assert f"step '{STAGE}' failed: out-of-memory" in told
    assert "made no progress" in told
    assert "slurm.memory_per_node" in told
    assert process_findings(user.run()) == []
    user.miles("resume", "proof", "--set", "slurm.setup=[]")
    user.until_state("done")
    assert user.reasons(stage=STAGE) == [EndReason.OUT_OF_MEMORY] * 2 + [EndReason.FINISHED]


@pytest.mark.slow
def test_a_run_that_is_killed_and_got_further_goes_on(slurm: Testbed, tmp_path: Path) -> None:
    user = User(tmp_path, slurm)
    paths = user.run()
    user.miles("submit", str(write_short_run(tmp_path, steps=40)))
    job = user.job()

    user.until(lambda: last_step(paths, STAGE) >= 2, "no step is made")
    (rank,) = (pid for pid, role in processes(paths).items() if role == "trainer")
    os.kill(rank, signal.SIGKILL)
    slurm.wait_state(job, "RUNNING", restarts=1, seconds=120)

    reached = last_step(paths, STAGE)
    user.until(lambda: last_step(paths, STAGE) > reached, "it does not go on")
    with paths.slurm_log(STAGE, job).open("a") as output:
        output.write(SLURMS_WORDS.format(job=job))
    slurm.run("scancel", "--signal=KILL", f"{job}.0")
    slurm.wait_state(job, "RUNNING", restarts=2, seconds=120)

    user.until_state("done")
    assert user.reasons(stage=STAGE) == [EndReason.TRAINER_CRASH, EndReason.OUT_OF_MEMORY, EndReason.FINISHED]
    killed = next(attempt for attempt in read_attempts(paths) if attempt.reason is EndReason.TRAINER_CRASH)
    assert "was killed by SIGKILL (the system does that when memory runs out)" in killed.detail
    assert len(read_jobs(paths)) == 2, "the job came back by itself"
    assert process_findings(paths) == []
