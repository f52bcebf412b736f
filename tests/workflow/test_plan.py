from pathlib import Path

import pytest

from miles.config.schema import DataSection, ModelSection, ReportStep, RunConfig, SftStep, TinyTaskStep
from miles.runs.directory import create_run
from miles.runs.paths import RunPaths
from miles.workflow.done import read_done, write_done
from miles.workflow.plan import plan_run


def _config(directory: Path, layers: int = 2, steps: int = 10) -> RunConfig:
    prepare = TinyTaskStep(kind="tiny-task", layers=layers)
    model, data = ModelSection(path="step:prepare/model"), DataSection(path="step:prepare/train.jsonl")
    warmup = SftStep.model_validate({"kind": "sft", "model": model, "data": data, "train": {"steps": steps}})
    report = ReportStep(kind="report", needs=["warmup"])
    every = {"prepare": prepare, "warmup": warmup, "report": report}
    return RunConfig(name="demo", runs_dir=str(directory), steps=every)


@pytest.fixture
def done(tmp_path: Path) -> RunPaths:
    """A run with all steps done."""
    config = _config(tmp_path)
    paths = create_run(config)
    for planned in plan_run(config, paths):
        (paths.step(planned.name) / "model").mkdir(parents=True)
        (paths.step(planned.name) / "model/weights").write_text("12345")
        write_done(paths, planned.name, planned.inputs, attempt=1, finished=100.0, seconds=5.0)
    return paths


def _todo(config: RunConfig, paths: RunPaths) -> dict[str, str]:
    return {planned.name: planned.why for planned in plan_run(config, paths) if planned.done is None}


def test_everything_is_to_do_in_a_new_run(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert _todo(config, create_run(config)) == dict.fromkeys(["prepare", "warmup", "report"], "not done yet")


def test_nothing_is_to_do_when_all_is_done(tmp_path: Path, done: RunPaths) -> None:
    assert _todo(_config(tmp_path), done) == {}
    record = read_done(done, "warmup")
    assert record is not None
    assert record.outputs == {"model/weights": 5}
    assert record.seconds == 5.0


def test_changed_step_and_all_that_depend_on_it_are_to_do(tmp_path: Path, done: RunPaths) -> None:
    assert _todo(_config(tmp_path, steps=11), done) == {
        "warmup": "train.steps 10 -> 11",
        "report": "step warmup changed",
    }
    assert list(_todo(_config(tmp_path, layers=3), done)) == ["prepare", "warmup", "report"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("123")])
def test_step_with_a_damaged_output_is_to_do(tmp_path: Path, done: RunPaths, damage) -> None:
    damage(done.step("warmup") / "model/weights")
    assert _todo(_config(tmp_path), done) == {"warmup": "output model/weights is missing or damaged"}
