import json
from pathlib import Path

import pytest

from miles.config.load import load_resolved
from miles.config.schema import RunConfig
from miles.errors import ConfigError, RunError
from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths
from miles.runs.samples import sampled_steps
from miles.workflow.fork import fork_run
from miles.workflow.plan import plan_run
from miles.workflow.stage import open_stage, opening_note, read_state


def _files(paths: RunPaths) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in paths.root.rglob("*") if file.is_file()}


def test_fork_goes_on_from_the_newest_checkpoint_with_another_config(trained: tuple[RunPaths, RunConfig]) -> None:
    source, _ = trained
    before = _files(source)
    forked = fork_run(source, "second", ["rollout.group_size=4"], stage="grpo", step=None)
    assert _files(source) == before
    paths = forked.paths
    assert paths.root == source.root.with_name("second")
    assert (forked.stage, forked.step) == ("grpo", 4)
    assert [change.key for change in forked.changes] == ["steps.grpo.rollout.group_size"]


def test_done_steps_are_taken_over_and_the_stage_opens_without_a_refusal(trained: tuple[RunPaths, RunConfig]) -> None:
    source, _ = trained
    forked = fork_run(source, "second", ["steps.grpo.train.lr=1e-3"], stage=None, step=2)
    paths, config = forked.paths, load_resolved(forked.paths.root)
    assert [change.key for change in forked.changes] == ["steps.grpo.train.lr"]
    assert forked.done == ["prepare", "warmup"]
    assert (paths.step("warmup") / "model/weights").read_text() == "warmup"
    to_do = [planned for planned in plan_run(config, paths) if planned.done is None]
    assert [planned.name for planned in to_do] == ["grpo", "report"]
    assert opening_note(paths, to_do[0]) == "continues after step 2"
    assert open_stage(paths, to_do[0]) == "continues after step 2"
    assert read_state(paths, "grpo").step == 2
    assert [line.step for line in read_metrics(paths) if line.stage == "grpo"] == [1, 2]
    assert [line.step for line in read_metrics(paths) if line.stage == "warmup"] == [1, 2, 3, 4]
    assert sampled_steps(paths, "grpo") == [1, 2]
    origin = json.loads(paths.forked.read_text())
    assert (origin["run"], origin["stage"], origin["step"]) == ("demo", "grpo", 2)


def test_fork_from_the_beginning_of_a_stage_takes_no_state_of_it(trained: tuple[RunPaths, RunConfig]) -> None:
    source, _ = trained
    forked = fork_run(source, "second", [], stage="warmup", step=0)
    assert forked.done == ["prepare"]
    assert forked.stage is None
    assert read_metrics(forked.paths) == []


def test_change_that_reaches_what_the_checkpoint_was_made_from_is_refused(trained: tuple[RunPaths, RunConfig]) -> None:
    source, _ = trained
    with pytest.raises(
        RunError, match="made from the output of 'warmup', which would run again: config changed"
    ) as caught:
        fork_run(source, "second", ["train.lr=1e-3"], stage=None, step=None)
    assert "--set steps.grpo.KEY=VALUE" in str(caught.value.fix)
    assert [path.name for path in source.root.parent.iterdir()] == ["demo"]
    fork_run(source, "second", ["train.lr=1e-3"], stage="grpo", step=0)


def test_new_run_must_not_exist_and_must_have_a_good_name(trained: tuple[RunPaths, RunConfig]) -> None:
    source, _ = trained
    with pytest.raises(RunError, match="there is a run 'demo' already"):
        fork_run(source, "demo", [], stage=None, step=None)
    with pytest.raises(ConfigError, match="a run name has letters"):
        fork_run(source, "a/b", [], stage=None, step=None)
    with pytest.raises(RunError, match="no checkpoint of step 3"):
        fork_run(source, "second", [], stage=None, step=3)
    assert [path.name for path in source.root.parent.iterdir()] == ["demo"]


def test_fork_lies_beside_its_source_wherever_it_is_made(
    trained: tuple[RunPaths, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = trained
    text = source.config.read_text().replace(str(tmp_path / "runs"), "runs")
    source.config.write_text(text)
    monkeypatch.chdir("/")
    assert fork_run(source, "second", [], stage=None, step=None).paths.root == tmp_path / "runs/second"
