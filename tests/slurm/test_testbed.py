"""The cluster of the tests does what the tests rely on: it preempts, requeues, loses nodes and becomes idle again."""

from __future__ import annotations

import time
from pathlib import Path

from slurm.testbed import Testbed, load, wait_text

WORK = """#!/bin/bash
#SBATCH --open-mode=append
echo start ${SLURM_RESTART_COUNT:-0}
srun bash -c 'trap "echo TERM; exit 0" TERM; echo up $SLURMD_NODENAME; for i in $(seq 600); do sleep .1; done'
sleep 60
"""


def test_job_of_low_is_preempted_and_put_back_into_the_queue(slurm: Testbed, tmp_path: Path) -> None:
    job = slurm.sbatch(WORK, "-N2", "--exclusive", "--requeue", "-o", tmp_path / "out")
    wait_text(tmp_path / "out", "up n2")
    slurm.preempt(job)
    slurm.wait_state(job, "RUNNING", restarts=1)
    assert "TERM" in wait_text(tmp_path / "out", "start 1")


def test_node_that_is_declared_down_requeues_its_job_and_comes_back(slurm: Testbed, tmp_path: Path) -> None:
    job = slurm.sbatch(WORK, "-w", "n2", "--requeue", "-o", tmp_path / "out")
    wait_text(tmp_path / "out", "up n2")
    slurm.set_down("n2")
    slurm.wait_state(job, "PENDING", "RUNNING", restarts=1)


def test_killed_slurmd_is_started_again_by_the_cleaning(slurm: Testbed) -> None:
    slurm.kill_node("n3")
    slurm.reset()
    # What the controller has not yet heard of the new one, its first launch may stumble over.
    while not slurm.run("srun", "-w", "n3", "hostname", check=False):
        time.sleep(0.5)


def test_loaded_from_its_directory_it_is_the_same_cluster(slurm: Testbed) -> None:
    assert load(slurm.directory) == slurm
