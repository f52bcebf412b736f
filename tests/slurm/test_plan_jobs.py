"""Which jobs a run becomes, in which order and after which others. No Slurm is needed."""

from pathlib import Path

import pytest

from miles.cluster.slurm.jobs import JobKind, JobRecord, append_job, read_jobs
from miles.cluster.slurm.submit import PlannedJob, plan_jobs
from miles.config.load import load_run
from miles.config.schema import RunConfig
from miles.runs.directory import create_run
from miles.runs.paths import RunPaths

RUN = """
name = "run"
runs_dir = "{directory}/runs"

[steps.prepare]
kind = "tiny-task"

[steps.warmup]
kind = "sft"
model = "step:prepare/model"
data = "step:prepare/demonstrations.jsonl"

[steps.grpo]
kind = "rl"
model = "step:warmup/model"
data = "step:prepare/train.jsonl"
rewards = [{{ grader = "exact" }}]

[steps.report]
kind = "report"
needs = ["grpo"]
"""


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunConfig, RunPaths]:
    return _run(tmp_path)


def _run(directory: Path, *overrides: str) -> tuple[RunConfig, RunPaths]:
    file = directory / "run.toml"
    file.write_text(RUN.format(directory=directory))
    config = load_run(file, overrides)
    return config, create_run(config)


def test_each_step_is_a_job_after_those_that_it_needs_and_after_the_one_before(
    run: tuple[RunConfig, RunPaths],
) -> None:
    jobs = plan_jobs(*run)
    assert [job.step for job in jobs] == ["prepare", "warmup", "grpo", "report"]
    assert [job.after_success for job in jobs] == [(), (0,), (0, 1), (2,)]
    ids = [11, 12, 13, 14]
    assert [job.dependency(ids) for job in jobs] == [None, "afterok:11", "afterok:11:12", "afterok:13"]


def test_a_job_that_needs_an_earlier_one_still_waits_for_the_one_before() -> None:
    assert PlannedJob("b", False, (0,), 1).dependency([7, 8]) == "afterok:7,afterany:8"
    assert PlannedJob("b", False, (), 1).dependency([7, 8]) == "afterany:8"


def test_a_chain_is_followed_and_what_needs_it_waits_for_its_last_job(tmp_path: Path) -> None:
    config, paths = _run(tmp_path, 'steps.grpo.slurm.restart="chain"', "steps.grpo.slurm.chain_length=3")
    jobs = plan_jobs(config, paths)
    assert [job.step for job in jobs] == ["prepare", "warmup", "grpo", "grpo", "grpo", "report"]
    assert [job.successor for job in jobs] == [False, False, False, True, True, False]
    ids = [1, 2, 3, 4, 5, 6]
    assert [job.dependency(ids) for job in jobs[2:]] == [
        "afterok:1:2",
        "afterok:1:2,afterany:3",
        "afterok:1:2,afterany:4",
        "afterok:5",
    ]


def test_ledger_gives_back_what_was_written(tmp_path: Path) -> None:
    records = [
        JobRecord("grpo", 12, JobKind.FIRST, "/runs/x/sbatch/grpo.sbatch", 1700000000.5, None),
        JobRecord("grpo", 13, JobKind.CHAIN, "/runs/x/sbatch/grpo.sbatch", 1700000001.5, "afterany:12"),
    ]
    for record in records:
        append_job(RunPaths(tmp_path), record)
    assert read_jobs(RunPaths(tmp_path)) == records
