"""Which jobs a run becomes, in which order and after which others. No Slurm is needed."""

from pathlib import Path

import pytest

from miles.cluster.slurm.arrays import check_size, plan_arrays
from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.jobs import JobKind, JobRecord, append_job, read_jobs
from miles.cluster.slurm.submit import PlannedJob, plan_jobs
from miles.config.load import load_run
from miles.config.schema import RunConfig
from miles.config.sweep import load_sweep
from miles.errors import ConfigError
from miles.runs.directory import create_run
from miles.runs.paths import RunPaths
from miles.workflow.done import write_done
from miles.workflow.plan import plan_run
from tests.two_stages import STEPS

RUN = f"""
name = "run"
runs_dir = "{{directory}}/runs"
{STEPS}rewards = [{{{{ grader = "exact" }}}}]

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


def test_an_elements_job_is_called_by_its_array_and_index(tmp_path: Path) -> None:
    record = JobRecord("grpo", 53, JobKind.FIRST, "/runs/x/sbatch/grpo.sbatch", 1.0, "aftercorr:52", 3)
    append_job(RunPaths(tmp_path), record)
    (read,) = read_jobs(RunPaths(tmp_path))
    assert (read, str(read.id)) == (record, "53_3")


def test_runs_with_the_same_jobs_to_do_share_arrays(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(directory=tmp_path))
    sweep = load_sweep(file, [], ["seed=0,1,2"])
    paths = create_run(sweep.members[1])
    inputs = plan_run(sweep.members[1], paths)[0].inputs
    write_done(paths, "prepare", inputs, attempt=1, finished=1.0, seconds=1.0)
    whole, rest = plan_arrays(sweep, at_once=None).groups
    assert [member.index for member in whole.members] == [0, 2]
    assert [job.step for job in whole.jobs] == ["prepare", "warmup", "grpo", "report"]
    assert [member.index for member in rest.members] == [1]
    assert [job.step for job in rest.jobs] == ["warmup", "grpo", "report"]
    assert [job.dependency([7, 8, 9], success="aftercorr") for job in rest.jobs] == [None, "aftercorr:7", "aftercorr:8"]


def test_a_sweep_larger_than_the_sites_arrays_is_refused() -> None:
    class Site(Slurm):
        def config(self) -> dict[str, str]:
            return {"MaxArraySize": "4"}

    check_size(4, Site())
    with pytest.raises(ConfigError, match="5 runs; a job array has at most 4 elements here"):
        check_size(5, Site())
