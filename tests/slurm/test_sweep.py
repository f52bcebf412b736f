"""A sweep on a real Slurm: one job array for each step, every element a run of its own.

Four runs, two at once: one is stopped while it waits, one is requeued (the element whose number as a job is that of the
whole array), and the others must not notice. The requeued one must end with the bits of the same seed submitted alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.cluster.slurm.jobs import JobKind, read_jobs
from miles.runs.attempts import EndReason, read_attempts
from slurm.testbed import Testbed
from slurm.user import User, differences, unsound
from tests.chaos.run import GRADER, STAGE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
"""A minute on an idle machine, many on one that others share."""

TASK = """
name = "task"
runs_dir = "{directory}/runs"
[steps.prepare]
kind = "tiny-task"
architecture = "qwen3-moe"
train_prompts = 40
heldout_prompts = 8
"""
RUN = """
name = "proof"
runs_dir = "{directory}/runs"

[train]
backend = "fsdp"
dtype = "float32"

[local]
threads = 1

[steps.grpo]
kind = "rl"
model = "{directory}/runs/task/steps/prepare/model"
data = "{directory}/runs/task/steps/prepare/train.jsonl"
rewards = [{{ grader = "{directory}/grader.py:grade" }}]

[steps.grpo.rollout]
prompts_per_step = 2
group_size = 4
max_response_tokens = 60

[steps.grpo.train]
steps = 3
lr = 1e-3

[steps.grpo.journal]
keep = "all"

[steps.report]
kind = "report"
needs = ["grpo"]
"""
SWEEP = ("--sweep", "seed=0,1,2,3", "--at-once", "2")
NAMES = [f"proof-seed-{seed}" for seed in range(4)]


@pytest.fixture
def user(slurm: Testbed, tmp_path: Path) -> User:
    (tmp_path / "grader.py").write_text(GRADER)
    for file, text in {"task.toml": TASK, "run.toml": RUN}.items():
        (tmp_path / file).write_text(text.format(directory=tmp_path))
    user = User(tmp_path, slurm)
    user.miles("submit", "task.toml", "--local")
    return user


def test_a_sweep_of_four_runs_one_stopped_and_one_requeued(user: User) -> None:
    submit = ("submit", "run.toml", *SWEEP)
    planned = user.miles(*submit, "--dry-run")
    assert ", ".join(NAMES) in planned and "--array=0-3%2" in planned
    assert not user.run(NAMES[0]).root.exists()
    user.miles(*submit)
    first, second = arrays = [record.job for record in read_jobs(user.run(NAMES[0]))]
    for index, name in enumerate(NAMES):
        assert [str(record.id) for record in read_jobs(user.run(name))] == [f"{array}_{index}" for array in arrays]

    # Submitted twice: refused, run by run, and nothing is changed.
    again = user.miles(*submit, code=4)
    assert all(f"run '{name}' is on Slurm already" in again for name in NAMES)
    assert f"job {second}_2 (step report): PENDING, Dependency" in again
    assert [record.job for record in read_jobs(user.run(NAMES[0]))] == arrays

    # One that waits is told as such; it is stopped, and the others are not.
    assert user.status(NAMES[2])["state"] == "queued"
    assert f"job {first}_2 of step '{STAGE}' waits (JobArrayTaskLimit" in user.miles("explain", NAMES[2])
    assert f"job {first}_2 (step {STAGE}), job {second}_2 (step report)" in user.miles("stop", NAMES[2])
    assert user.status(NAMES[2])["state"] == "pending"
    assert all(user.status(name)["cluster"]["jobs"][-1]["live"] for name in (NAMES[0], NAMES[1], NAMES[3]))
    user.miles("submit", "run.toml", "--set", 'name="alone"', "--set", "seed=3")

    # The last element has the array's own number: a command that took it would be about all of them.
    user.until_step(1, NAMES[3])
    status = user.status(NAMES[3])
    assert status["holder"]["job"] == status["cluster"]["jobs"][0]["job"] == first
    assert f"{first}_3" in user.miles("runs")
    user.miles("preempt", NAMES[3], "--grace", "60")
    finish = (NAMES[0], NAMES[1], NAMES[3], "alone")
    reports = [user.run(name).done("report") for name in finish]
    user.until(lambda: all(report.exists() for report in reports), "not all are done", NAMES[3], seconds=900.0)
    for name in finish:
        user.until_state("done", name)
    assert user.reasons(NAMES[3]) == [EndReason.PREEMPTED, EndReason.FINISHED]
    for name in (NAMES[0], NAMES[1]):
        assert [attempt.reason for attempt in read_attempts(user.run(name))] == [EndReason.FINISHED] * 2
    assert differences(user.run(NAMES[3]), user.run("alone")) == []
    assert differences(user.run(NAMES[0]), user.run("alone")) != [], "another seed is another run"
    for name in (NAMES[0], NAMES[1], NAMES[3]):
        assert unsound(user.run(name)) == []
    assert f"slurm-report-{second}.out" in user.miles("logs", NAMES[3], "--role", "job")
    assert "requeue" in user.run(NAMES[3]).slurm_log(STAGE, first).read_text().lower()

    # The same command again submits what is left, which is one run; alone it is a job like any other.
    assert "of 1 run" in user.miles(*submit)
    assert [record.kind for record in read_jobs(user.run(NAMES[2]))] == [JobKind.FIRST] * 2 + [JobKind.RESUME] * 2
    assert [len(read_jobs(user.run(name))) for name in NAMES] == [2, 2, 4, 2]
    user.miles("stop", NAMES[2], "--now")
    user.miles("resume", NAMES[2])
    assert read_jobs(user.run(NAMES[2]))[-1].element is None
    user.miles("stop", NAMES[2], "--now")
