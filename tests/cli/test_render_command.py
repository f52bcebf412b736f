"""`miles render`: prints scripts, and writes nothing."""

from pathlib import Path

from tests.cli.conftest import Miles

TWO_STEPS = """
name = "demo"
[steps.prepare]
kind = "tiny-task"
[steps.report]
kind = "report"
"""


def test_render_prints_the_script_of_each_step_and_creates_nothing(miles: Miles, directory: Path) -> None:
    (directory / "run.toml").write_text(TWO_STEPS)
    both = miles("render", "run.toml")
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("#!/bin/bash") == 2
    one = miles("render", "run.toml", "--step", "prepare", "--set", 'slurm.partition="gpu"')
    assert "#SBATCH --job-name=demo.prepare\n#SBATCH --partition=gpu\n" in one.stdout
    assert one.stdout.count("#!/bin/bash") == 1
    assert [file.name for file in directory.iterdir()] == ["run.toml"]


def test_a_step_that_there_is_not(miles: Miles) -> None:
    done = miles("render", "run.toml", "--step", "prepar")
    assert done.returncode == 2
    assert "Did you mean 'prepare'?" in done.stderr


def test_a_mistake_in_setup_is_told_before_anything_is_submitted(miles: Miles) -> None:
    done = miles("render", "run.toml", "--set", 'slurm.setup=["if true; then"]')
    assert done.returncode == 2
    assert "bash cannot read the batch script" in done.stderr
