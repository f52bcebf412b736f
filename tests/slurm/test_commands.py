"""Slurm's commands on a real cluster: submission, states through a job's life, refusals, a controller that is away."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from miles.cluster.slurm.commands import Slurm, SlurmDown, SlurmError, UnknownJob
from miles.cluster.slurm.states import JobState
from slurm.conftest import become_user
from slurm.testbed import Testbed, wait_text

QUICK = Slurm(patience=0)


def write_script(directory: Path, body: str, *options: str) -> Path:
    script = directory / "job script.sh"
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in (f"--output={directory}/out", *options)), body, ""]
    script.write_text("\n".join(lines))
    return script


def wait_job(slurm: Testbed, job: int, state: JobState) -> None:
    slurm.wait_state(job, state.value)


def test_job_is_followed_from_the_queue_to_its_end(slurm: Testbed, tmp_path: Path) -> None:
    job = QUICK.submit(
        write_script(tmp_path, "echo up; sleep 600", "--nodes=2", '--job-name="a UserId=1(2) JobState=X"')
    )
    wait_text(tmp_path / "out", "up")
    running = QUICK.jobs([job])[job]
    assert (running.state, running.nodes, running.node_count) == (JobState.RUNNING, ("n1", "n2"), 2)
    assert (running.partition, running.restarts, running.reason) == ("low", 0, "")
    assert running.start is not None and abs(running.start - time.time()) < 60
    assert running.end_limit == running.start + 3600
    assert QUICK.show(job) == running
    QUICK.cancel([job])
    wait_job(slurm, job, JobState.CANCELLED)
    QUICK.cancel([job])  # harmless
    ended = QUICK.jobs([job])[job]
    assert ended.state is JobState.CANCELLED and ended.state.ended


def test_exit_code_and_restarts_are_told(slurm: Testbed, tmp_path: Path) -> None:
    job = QUICK.submit(write_script(tmp_path, "exit ${SLURM_RESTART_COUNT:-7}", "--requeue"))
    wait_job(slurm, job, JobState.FAILED)
    assert QUICK.jobs([job])[job].exit_code == 7
    QUICK.requeue(job)
    slurm.wait_state(job, "FAILED", restarts=1)
    again = QUICK.jobs([job])[job]
    assert (again.exit_code, again.restarts) == (1, 1)
    assert QUICK.show(job) == again


def test_preempted_job_waits_with_its_reason(slurm: Testbed, tmp_path: Path) -> None:
    job = QUICK.submit(write_script(tmp_path, "echo up; sleep 600", "--nodes=4", "--exclusive", "--requeue"))
    wait_text(tmp_path / "out", "up")
    slurm.preempt(job, seconds=60)
    while QUICK.jobs([job])[job].preempted is None:  # said until its grace is over
        time.sleep(0.1)
    slurm.wait_state(job, "PENDING", restarts=1)
    while not (waiting := QUICK.jobs([job])[job]).reason:  # comes with the scheduler's next look
        time.sleep(0.1)
    assert waiting.state.waiting and waiting.state.live
    assert waiting.reason in ("BeginTime", "Priority", "Resources")
    assert waiting.nodes == ()


def test_dependency_that_cannot_be_met_cancels(slurm: Testbed, tmp_path: Path) -> None:
    first = QUICK.submit(write_script(tmp_path, "exit 3"))
    second = QUICK.submit(
        write_script(tmp_path, "echo never", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    )
    wait_job(slurm, second, JobState.CANCELLED)
    assert QUICK.jobs([first, second])[second].reason == "DependencyNeverSatisfied"


def test_signals_reach_steps_or_the_script(slurm: Testbed, tmp_path: Path) -> None:
    body = """trap 'echo script USR1' USR1
srun bash -c 'trap "echo step USR1; exit 0" USR1; echo up; while :; do sleep .1; done' &
wait; wait; sleep 1"""
    job = QUICK.submit(write_script(tmp_path, body))
    wait_text(tmp_path / "out", "up")
    QUICK.cancel([job], signal="USR1", batch=True)
    assert "step USR1" not in wait_text(tmp_path / "out", "script USR1")
    QUICK.cancel([job], signal="USR1")
    wait_text(tmp_path / "out", "step USR1")


def test_jobs_that_slurm_does_not_know_are_left_out(slurm: Testbed, tmp_path: Path) -> None:
    job = QUICK.submit(write_script(tmp_path, "true"))
    assert set(QUICK.jobs([job, 99999])) == {job}
    assert QUICK.jobs([99999]) == {}
    assert QUICK.jobs([]) == {}
    assert QUICK.show(99999) is None
    QUICK.cancel([99999])
    with pytest.raises(UnknownJob, match="99999"):
        QUICK.requeue(99999)


def test_refusals_say_the_command_the_answer_and_what_to_do(slurm: Testbed, tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match=r"(?s)`sbatch .*Invalid partition name") as refused:
        QUICK.submit(write_script(tmp_path, "true", "--partition=nope"))
    assert "miles doctor" in (refused.value.fix or "")
    with pytest.raises(SlurmError, match="unrecognized option"):
        QUICK.submit(write_script(tmp_path, "true", "--no-such-option"))
    with pytest.raises(SlurmError, match="configuration is not available"):
        QUICK.test_only(write_script(tmp_path, "true", "--nodes=9"))
    with pytest.raises(SlurmError, match=r"Unable to open file|No such file"):
        QUICK.submit(tmp_path / "missing.sh")


def test_job_that_may_not_be_requeued_points_to_the_chain(slurm: Testbed, tmp_path: Path) -> None:
    job = QUICK.submit(write_script(tmp_path, "echo up; sleep 600", "--no-requeue"))
    wait_text(tmp_path / "out", "up")
    with pytest.raises(SlurmError, match="presently disabled") as refused:
        QUICK.requeue(job)
    assert 'restart = "chain"' in (refused.value.fix or "")


def test_estimated_start_is_a_time_and_submits_nothing(slurm: Testbed, tmp_path: Path) -> None:
    told = QUICK.test_only(write_script(tmp_path, "true"))
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d using 1 processors on nodes n1", told)
    assert slurm.run("squeue", "-h") == ""


def test_variables_of_commands_and_of_a_surrounding_job_change_nothing(
    slurm: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SBATCH_PARTITION": "nope",
        "SQUEUE_STATES": "FAILED",
        "SQUEUE_FORMAT": "%j",
        "SCANCEL_STATE": "PENDING",
        "SLURM_TIME_FORMAT": "relative",
        "SLURM_JOB_ID": "12",
    }.items():
        monkeypatch.setenv(name, value)
    job = QUICK.submit(write_script(tmp_path, "echo up; sleep 600"))
    wait_text(tmp_path / "out", "up")
    assert QUICK.jobs([job])[job].end_limit is not None
    QUICK.cancel([job])
    wait_job(slurm, job, JobState.CANCELLED)


def test_without_accounting_there_is_no_history(slurm: Testbed, tmp_path: Path) -> None:
    job = QUICK.submit(write_script(tmp_path, "true"))
    assert QUICK.accounted([job]) == {}
    assert QUICK.accounted([]) == {}


def test_site_is_told(slurm: Testbed) -> None:
    assert QUICK.version() >= (22, 5)
    partitions = {partition.name: partition for partition in QUICK.partitions()}
    low, high = partitions["low"], partitions["high"]
    assert (low.default, low.up, low.preempt_mode, low.grace, low.nodes) == (True, True, "REQUEUE", slurm.grace, 4)
    assert (low.max_time, low.default_time, low.max_nodes) == (None, 3600, None)
    assert high.priority_tier > low.priority_tier
    group = next(group for group in QUICK.node_groups() if group.partition == "low")
    assert (group.count, group.cpus, group.gpus, group.usable) == (4, 8, {"": 8}, True)
    config = QUICK.config()
    assert (config["ClusterName"], config["JobRequeue"], config["PreemptType"]) == (
        "testbed",
        "1",
        "preempt/partition_prio",
    )


def test_controller_that_is_away_is_waited_for_and_named(
    slurm_clusters: Callable[..., Testbed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = slurm_clusters(nodes=1)
    become_user(bed, monkeypatch)
    script = write_script(tmp_path, "true")
    bed.stop_controller()
    with pytest.raises(SlurmDown, match="Unable to contact slurm controller") as away:
        QUICK.jobs([1])
    assert "try again later" in (away.value.fix or "")
    starting = threading.Thread(target=bed.up)
    starting.start()
    job = Slurm(patience=60).submit(script)
    starting.join()
    wait_job(bed, job, JobState.COMPLETED)


def test_without_slurm_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="squeue is not on this machine") as missing:
        Slurm().jobs([1])
    assert "--local" in (missing.value.fix or "")


def test_command_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\nexec sleep 60\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SlurmDown, match=r"did not end within 0\.2 s") as hung:
        Slurm(timeout=0.2).submit(tmp_path / "script.sh")
    assert "may have been submitted" in (hung.value.fix or "")
