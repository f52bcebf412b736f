"""What a step's job is made of, from the resolved config."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from miles.cluster.containers import source_tree
from miles.cluster.slurm.render import render_job
from miles.cluster.slurm.spec import job_spec
from miles.config.load import load_run
from miles.runs.paths import RunPaths
from tests.config.conftest import folder, write  # noqa: F401

HEAD = """name = "r"
model = "hf"
data = "prompts.jsonl"
[slurm]
nodes = "2-4"
gpus_per_node = 8
"""


def test_a_training_step_starts_the_supervisor_of_its_run(
    write: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "graders")
    paths = RunPaths(tmp_path / "runs/r")
    spec = job_spec(load_run(write(HEAD)), "train", paths, dependency="afterok:4")
    assert spec.command == (sys.executable, *f"-m miles.cluster.node --run-dir {paths.root} --step train".split())
    assert (spec.run, spec.step, spec.nodes, spec.needs_ranks) == ("r", "train", "2-4", True)
    assert spec.dependency == "afterok:4"
    assert spec.output == paths.root / "logs/slurm-train-%j.out"
    assert spec.environment == {"PYTHONPATH": f"{source_tree()}:{tmp_path / 'graders'}"}


def test_a_step_without_ranks_gets_one_node_and_no_gpu(write: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    config = load_run(write(HEAD))
    spec = job_spec(config, "report", RunPaths(tmp_path), dependency=None)
    assert (spec.nodes, spec.needs_ranks) == ("1", False)
    script = render_job(spec)
    assert "--nodes=1\n" in script
    assert "gres" not in script


def test_a_container_sees_the_model_the_data_and_the_graders(write: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "image.sif").touch()
    text = HEAD + '[container]\nruntime = "apptainer"\nimage = "image.sif"\n[[rewards]]\ngrader = "grader.py:score"\n'
    paths = RunPaths(tmp_path / "runs/r")
    spec = job_spec(load_run(write(text)), "train", paths, dependency=None)
    for bound in (paths.root, tmp_path / "hf", tmp_path / "prompts.jsonl", tmp_path / "grader.py"):
        assert f"{bound}:{bound}" in spec.command
    assert "--nv" in spec.command
    assert str(tmp_path / "image.sif") in spec.command
    assert spec.command[-7:] == ("python3", "-m", "miles.cluster.node", "--run-dir", str(paths.root), "--step", "train")
    assert spec.environment == {}


def test_a_template_is_found_beside_the_run_file_that_names_it(write: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    write("#!/bin/bash\n# {{ run }}.{{ step }}\n", "site/job.j2")
    write('[slurm]\ntemplate = "job.j2"\n', "site/base.toml")
    config = load_run(write('extends = "site/base.toml"\n' + HEAD))
    assert config.steps["train"].slurm.template == str(tmp_path / "site/job.j2")
    assert render_job(job_spec(config, "train", RunPaths(tmp_path), dependency=None)) == "#!/bin/bash\n# r.train\n"
