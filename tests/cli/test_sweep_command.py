"""`--sweep` without Slurm: runs one after the other here, scripts that are printed, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Miles


def test_runs_go_one_after_the_other_and_one_that_fails_does_not_keep_the_others(miles: Miles) -> None:
    # 32 is no size that the model can have, which the step itself finds out.
    done = miles("submit", "run.toml", "--local", "--sweep", "steps.prepare.hidden_size=32,64")
    assert done.returncode == 2, done.stderr
    assert "run 2 of 2: demo-hidden_size-64" in done.stdout
    assert "1 of 2 runs failed: demo-hidden_size-32" in done.stderr
    listed = {run["name"]: run["state"] for run in json.loads(miles("runs", "--json").stdout)}
    assert listed == {"demo-hidden_size-32": "failed", "demo-hidden_size-64": "done"}


def test_render_prints_each_array_before_the_scripts_of_its_elements(miles: Miles, directory: Path) -> None:
    done = miles("render", "run.toml", "--sweep", "seed=0,1", "--at-once", "1")
    assert done.returncode == 0, done.stderr
    names = [line for line in done.stdout.splitlines() if line.startswith("#SBATCH --job-name=")]
    assert [name.partition("=")[2] for name in names] == ["demo.prepare", "demo-seed-0.prepare", "demo-seed-1.prepare"]
    assert "#SBATCH --array=0-1%1\n" in done.stdout
    assert [file.name for file in directory.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("submit", "run.toml", "--at-once", "2"), "--at-once is about the runs of a sweep"),
        (("submit", "run.toml", "--local", "--sweep", "seed=0,1", "--detach"), "--detach with --sweep"),
        (("submit", "run.toml", "--local", "--sweep", "seed=0,1", "--at-once", "2"), "--at-once with --local"),
        (("render", "run.toml", "--sweep", "seed=0,1", "--set", 'slurm.restart="chain"'), "has no successors"),
        (("render", "run.toml", "--sweep", "seed=0,0"), "the value 0 is there twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    miles: Miles, directory: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = miles(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert [file.name for file in directory.iterdir()] == ["run.toml"]
