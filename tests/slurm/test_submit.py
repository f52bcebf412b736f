"""A run on a real Slurm cluster, as its user sees it: submitted, watched, preempted, stopped, continued.

One small run is finished without disturbance; the others begin from its warm start and must end with its bits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from miles.cluster.slurm.jobs import JobKind, read_jobs
from miles.runs.attempts import EndReason, read_attempts
from slurm.testbed import Testbed
from slurm.user import SECONDS, User
from tests.chaos.audit import process_findings
from tests.chaos.run import STAGE, WARMUP, Case

pytestmark = pytest.mark.timeout(900)
"""Half a minute each on an idle machine, minutes on one that many share."""
CASE = Case("fsdp", steps=4, checkpoint_every=2, eval_every=4, hidden_size=64)
TO_DO = ["prepare", WARMUP, STAGE]


@pytest.fixture(scope="session")
def finished(slurm_clusters: Callable[..., Testbed], tmp_path_factory: pytest.TempPathFactory) -> User:
    """A run that nothing happened to, submitted and finished, with what its user saw on the way."""
    user = User(tmp_path_factory.mktemp("user"), slurm_clusters())
    file = user.write(CASE)
    plan = user.miles("submit", str(file), "--dry-run")
    assert not user.run().root.exists()
    for step in TO_DO:
        assert f"step {step}" in plan
    assert "after 'warmup' has ended well" in plan
    assert "using" in plan, "Slurm says when it would start"

    submitted = user.miles("submit", str(file))
    jobs = read_jobs(user.run())
    assert [job.step for job in jobs] == TO_DO
    assert jobs[1].dependency == f"afterok:{jobs[0].job}"
    assert all(f"job {job.job}: step {job.step}" in submitted for job in jobs)

    again = user.miles("submit", str(file), code=4)
    assert "run 'proof' is on Slurm already" in again
    assert f"job {jobs[-1].job} (step {STAGE}): PENDING, Dependency" in again
    assert read_jobs(user.run()) == jobs
    assert user.status()["state"] in ("queued", "running")
    assert f"job {jobs[0].job}" in user.miles("explain", "proof") + user.miles("status", "proof")

    user.until_step(1)
    status = user.status()
    assert (status["state"], status["holder"]["job"]) == ("running", jobs[-1].job)
    assert status["cluster"]["jobs"][-1]["state"] == "RUNNING"
    assert f"it runs: step '{STAGE}', attempt 1" in user.miles("explain", "proof")
    listed = user.miles("runs")
    assert "running" in listed and str(jobs[-1].job) in listed
    user.until_state("done")
    return user


def test_a_finished_run_is_told_and_does_nothing_when_it_is_run_again(finished: User) -> None:
    user, paths = finished, finished.run()
    assert [attempt.reason for attempt in read_attempts(paths)] == [EndReason.FINISHED] * 3
    assert "it is done" in user.miles("explain", "proof")
    assert "step 4" in user.miles("logs", "proof", "--role", "trainer", "--node", read_attempts(paths)[-1].host)
    attempts, jobs = paths.attempts.read_bytes(), read_jobs(paths)
    assert "is done" in user.miles("resume", "proof")
    job = jobs[-1].job
    user.bed.run("scontrol", "requeue", job)
    user.bed.wait_state(job, "COMPLETED", restarts=1)
    assert paths.attempts.read_bytes() == attempts
    assert process_findings(paths) == []
    user.bed.stop_controller()
    try:
        told = user.miles("status", "proof")
    finally:
        user.bed.up()
    assert "Slurm could not be asked" in told
    assert "✓" in told


def test_preempted_and_requeued_it_ends_with_the_same_bits(finished: User) -> None:
    user, paths = finished, finished.fork("preempted")
    user.miles("resume", "preempted")
    job = user.job("preempted")
    user.until_step(1, "preempted")
    user.bed.preempt(job)
    user.bed.wait_state(job, "PENDING", "RUNNING", restarts=1, seconds=SECONDS)
    user.until_step(3, "preempted")
    user.bed.run("scontrol", "requeue", job)
    user.until_state("done", "preempted")
    assert user.reasons("preempted") == [EndReason.PREEMPTED, EndReason.REQUEUED, EndReason.FINISHED]
    assert len(read_jobs(paths)) == 1
    assert user.settled(paths) == []


def test_preempted_where_the_batch_script_alone_is_warned(
    finished: User, slurm_clusters: Callable[..., Testbed]
) -> None:
    # The grace is so long that nothing but the warning, handed on to the supervisors, can end the attempt.
    user = User(finished.directory, slurm_clusters(send_user_signal=True, grace=600))
    paths = user.fork("warned")
    user.miles("resume", "warned")
    user.until_step(1, "warned")
    job = user.job("warned")
    user.bed.preempt(job)
    user.until_state("done", "warned")
    user.until(lambda: not user.bed.run("squeue", "-h"), "Slurm has the job still", "warned")
    assert user.reasons("warned") == [EndReason.PREEMPTED, EndReason.FINISHED]
    output = paths.slurm_log(STAGE, job).read_text()
    assert "*** STEP" not in output and "DUE TO PREEMPTION" not in output, "Slurm itself has ended something"
    assert user.settled(paths) == []


def test_stopped_it_saves_and_stays_down_and_goes_on_when_told(finished: User) -> None:
    user, paths = finished, finished.fork("stopped")
    user.miles("resume", "stopped")
    user.until_step(1, "stopped")
    assert "is stopped" in user.miles("stop", "stopped")
    assert user.status("stopped")["state"] == "stopped"
    assert user.reasons("stopped") == [EndReason.STOPPED]
    assert process_findings(paths) == []
    assert "is not running" in user.miles("stop", "stopped", code=4)
    assert "was interrupted: stopped" in user.miles("explain", "stopped")
    user.miles("resume", "stopped")
    assert [job.kind for job in read_jobs(paths)] == [JobKind.FIRST, JobKind.RESUME]
    user.until_state("done", "stopped")
    assert user.reasons("stopped") == [EndReason.STOPPED, EndReason.FINISHED]
    assert user.settled(paths) == []


def test_where_requeueing_is_forbidden_a_chain_takes_over(
    finished: User, slurm_clusters: Callable[..., Testbed]
) -> None:
    user = User(finished.directory, slurm_clusters(requeue=False))
    chain = ('slurm.restart="chain"', "slurm.chain_length=3")
    paths = user.fork("chained", *chain)
    user.miles("resume", "chained")
    first, second, third = (job.job for job in read_jobs(paths))
    assert [job.kind for job in read_jobs(paths)] == [JobKind.FIRST, JobKind.CHAIN, JobKind.CHAIN]
    user.until_step(1, "chained")
    user.miles("preempt", "chained", "--grace", "20")
    user.until_state("done", "chained")
    user.bed.wait_state(third, "COMPLETED")
    assert user.reasons("chained") == [EndReason.PREEMPTED, EndReason.FINISHED]
    assert {attempt.place.job for attempt in read_attempts(paths) if attempt.place} == {first, second}
    assert user.settled(paths) == []


def test_two_nodes_finish_with_ranks_and_engines_on_both(finished: User) -> None:
    user, paths = finished, finished.fork("wide", "slurm.nodes=2")
    user.miles("resume", "wide")
    user.until_state("done", "wide")
    (attempt,) = read_attempts(paths)
    assert attempt.place is not None
    assert (len(attempt.place.nodes), attempt.place.ranks) == (2, 2)
    logs = sorted(file.name for file in paths.logs(attempt.number).glob("*.log"))
    for node in attempt.place.nodes:
        assert any(log.startswith(f"trainer-{node}-") for log in logs), logs
        assert any(log.startswith(f"engine-{node}-") for log in logs), logs
    assert process_findings(paths) == []
