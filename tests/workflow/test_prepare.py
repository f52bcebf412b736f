"""What is checked and made before a run's driver starts."""

from pathlib import Path

import pytest

from miles.config.load import load_resolved
from miles.errors import ConfigError, RunError
from miles.runs.claim import Claim
from miles.runs.files import read_json_lines
from miles.workflow.prepare import prepare_resume, prepare_run
from tests.two_stages import STEPS

RUN = """
name = "demo"
runs_dir = "{runs}"
[steps.report]
kind = "report"
"""

TRAINING = f"""
name = "demo"
runs_dir = "{{runs}}"
{STEPS}"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(runs=tmp_path / "runs"))
    return file


def test_prepared_run_has_the_files_config_with_overrides(file: Path) -> None:
    prepared = prepare_run(file, ["seed=3"], fresh=False)
    assert load_resolved(prepared.paths.root).seed == 3
    assert prepared.set_aside is None


def test_fresh_sets_the_earlier_run_aside_whatever_its_config(file: Path, tmp_path: Path) -> None:
    prepare_run(file, [], fresh=True)
    with pytest.raises(RunError, match="seed: 0 in the run, 3 now"):
        prepare_run(file, ["seed=3"], fresh=False)
    prepared = prepare_run(file, ["seed=3"], fresh=True)
    assert prepared.set_aside == tmp_path / "runs/demo.old-1"
    assert load_resolved(prepared.paths.root).seed == 3
    assert load_resolved(prepared.set_aside).seed == 0


def test_run_in_use_is_neither_opened_nor_set_aside(file: Path) -> None:
    paths = prepare_run(file, [], fresh=False).paths
    with Claim.acquire(paths), pytest.raises(RunError, match="in use"):
        prepare_run(file, [], fresh=True)
    assert paths.config.exists()


def test_wrong_file_leaves_no_run(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        prepare_run(file, ["steps.report.kind=rapport"], fresh=False)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def training(file: Path, tmp_path: Path) -> Path:
    file.write_text(TRAINING.format(runs=tmp_path / "runs"))
    return file


def test_keys_that_may_change_are_taken_over_and_recorded(training: Path) -> None:
    paths = prepare_run(training, [], fresh=False).paths
    prepared = prepare_run(training, ["checkpoint.every=5", "engine.extra_args=['--a']"], fresh=False)
    assert [change.key for change in prepared.changes] == [
        "steps.grpo.checkpoint.every",
        "steps.grpo.engine.extra_args",
        "steps.warmup.checkpoint.every",
    ]
    step = load_resolved(paths.root).steps["grpo"]
    assert (step.checkpoint.every, step.engine.extra_args) == (5, ["--a"])
    recorded = [(line["key"], line["old"], line["new"]) for line in read_json_lines(paths.config_changes)]
    assert recorded == [(change.key, change.old, change.new) for change in prepared.changes]
    assert prepare_run(training, ["checkpoint.every=5", "engine.extra_args=['--a']"], fresh=False).changes == []


def test_one_change_that_is_refused_refuses_all(training: Path) -> None:
    paths = prepare_run(training, [], fresh=False).paths
    before = paths.config.read_text()
    with pytest.raises(RunError) as caught:
        prepare_run(training, ["checkpoint.every=5", "train.lr=1e-3"], fresh=False)
    refused, allowed = caught.value.message.split("these alone would be taken over:")
    assert "steps.grpo.train.lr: 1e-06 in the run, 0.001 now" in refused
    assert 'steps.warmup.checkpoint.every: "auto" in the run, 5 now' in allowed
    assert "checkpoint" not in refused
    assert "miles fork demo NEW" in str(caught.value.fix)
    assert paths.config.read_text() == before
    assert not paths.config_changes.exists()


def test_resume_needs_the_directory_alone(training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = prepare_run(training, [], fresh=False).paths
    training.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    prepared = prepare_resume(paths, ["local.threads=2", "steps.grpo.train.steps=200"])
    assert prepared.paths == paths
    assert [planned.name for planned in prepared.to_do] == ["prepare", "warmup", "grpo"]
    config = load_resolved(paths.root)
    assert {config.steps[name].local.threads for name in ("warmup", "grpo")} == {2}
    assert config.steps["grpo"].train.steps == 200
    with pytest.raises(RunError, match=r"steps\.grpo\.train\.steps: 200 in the run, 100 now"):
        prepare_resume(paths, ["steps.grpo.train.steps=100"])
