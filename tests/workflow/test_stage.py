import json
from pathlib import Path

import pytest

from miles.config.schema import DataSection, ModelSection, ReportStep, RunConfig, SftStep, TinyTaskStep, TrainSection
from miles.errors import RunError
from miles.runs.directory import create_run
from miles.runs.metrics import MetricsWriter, read_metrics
from miles.runs.paths import RunPaths
from miles.runs.samples import SampleRecord, sampled_steps, write_samples
from miles.workflow.done import write_done
from miles.workflow.fingerprint import Inputs
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.stage import open_stage, read_inputs, read_state, stage_fingerprint


def _config(directory: Path, **train: object) -> RunConfig:
    prepare = TinyTaskStep(kind="tiny-task")
    model, data = ModelSection(path="step:prepare/model"), DataSection(path="step:prepare/train.jsonl")
    warmup = SftStep(kind="sft", model=model, data=data, train=TrainSection.model_validate(train))
    report = ReportStep(kind="report", needs=["warmup"])
    return RunConfig(
        name="demo", runs_dir=str(directory), steps={"prepare": prepare, "warmup": warmup, "report": report}
    )


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return create_run(_config(tmp_path))


def _plan(paths: RunPaths, name: str, **train: object) -> PlannedStep:
    return next(step for step in plan_run(_config(paths.root.parent, **train), paths) if step.name == name)


def _train(paths: RunPaths, *, checkpoints: list[int], journal: list[int]) -> None:
    """Traces of training as the loop leaves them."""
    for step in checkpoints:
        directory = paths.checkpoints("warmup") / f"step-{step:06d}"
        directory.mkdir(parents=True)
        (directory / "manifest.json").write_text("{}")
    for step in journal:
        directory = paths.journal("warmup") / f"step-{step:06d}"
        directory.mkdir(parents=True)
        (directory / "batch-0123456789abcdef.h5").touch()
    for step in range(1, 1 + max([0, *checkpoints, *journal])):
        MetricsWriter(paths).write("warmup", step, {"loss": 1.0})
        write_samples(paths, "warmup", step, [SampleRecord("a", "b", None, 1.0)])


@pytest.mark.parametrize(
    ("checkpoints", "journal", "note"),
    [
        ([], [], ""),
        ([2, 4], [], "continues after step 4"),
        ([2, 4], [3, 4, 5], "continues after step 5: checkpoint of step 4, 1 step is replayed"),
        ([2, 4], [5, 6, 8], "continues after step 6: checkpoint of step 4, 2 steps are replayed"),
        ([4], [6], "continues after step 4"),
        ([], [1, 2], "continues after step 2, replayed from the journal"),
    ],
)
def test_stage_with_the_same_inputs_keeps_its_state(
    paths: RunPaths, checkpoints: list[int], journal: list[int], note: str
) -> None:
    assert open_stage(paths, _plan(paths, "warmup")) == ""
    _train(paths, checkpoints=checkpoints, journal=journal)
    lines, state = read_metrics(paths), read_state(paths, "warmup")
    (paths.step("warmup") / "model").mkdir()
    assert open_stage(paths, _plan(paths, "warmup")) == note
    assert read_metrics(paths) == lines
    assert len(sampled_steps(paths, "warmup")) == len(lines)
    assert read_state(paths, "warmup") == state
    assert not (paths.step("warmup") / "model").exists(), "half an output is no state"


def test_checkpoint_without_a_manifest_is_no_state(paths: RunPaths) -> None:
    (paths.checkpoints("warmup") / "step-000002").mkdir(parents=True)
    assert read_state(paths, "warmup").step == 0


def test_fingerprint_is_that_of_the_opened_stage(paths: RunPaths) -> None:
    planned = _plan(paths, "warmup")
    open_stage(paths, planned)
    assert stage_fingerprint(paths, "warmup") == planned.inputs.fingerprint


def test_changed_inputs_are_refused_while_there_is_state_to_lose(paths: RunPaths) -> None:
    open_stage(paths, _plan(paths, "warmup"))
    assert open_stage(paths, _plan(paths, "warmup", lr=1e-3)) == "", "nothing was trained"
    _train(paths, checkpoints=[4], journal=[])
    with pytest.raises(RunError, match=r"'warmup' has 4 training steps .* other inputs: config changed") as caught:
        open_stage(paths, _plan(paths, "warmup", lr=1e-2))
    assert "miles resume demo --restart warmup" in str(caught.value.fix)
    assert read_state(paths, "warmup").step == 4
    assert "continues" in open_stage(paths, _plan(paths, "warmup", lr=1e-3)), "undone, it goes on"


def test_done_stage_that_has_to_run_again_starts_over(paths: RunPaths) -> None:
    planned = _plan(paths, "warmup")
    open_stage(paths, planned)
    _train(paths, checkpoints=[4], journal=[])
    write_done(paths, "warmup", planned.inputs, attempt=1, finished=100.0, seconds=5.0)
    assert open_stage(paths, _plan(paths, "warmup", lr=1e-3)).startswith("starts over (config changed)")
    assert read_state(paths, "warmup").step == 0
    assert read_metrics(paths) == []
    assert list(paths.root.glob("discarded/**/manifest.json")), "nothing is deleted"


def test_done_stage_that_is_given_more_steps_goes_on(paths: RunPaths) -> None:
    planned = _plan(paths, "warmup", steps=4)
    open_stage(paths, planned)
    _train(paths, checkpoints=[4], journal=[])
    write_done(paths, "warmup", planned.inputs, attempt=1, finished=100.0, seconds=5.0)
    more = _plan(paths, "warmup", steps=6)
    assert (more.done, more.why) == (None, "train.steps 4 -> 6")
    assert open_stage(paths, more) == "continues after step 4"
    assert read_inputs(paths, "warmup") == more.inputs
    assert not paths.done("warmup").exists()


def test_other_kinds_start_from_their_beginning(paths: RunPaths) -> None:
    planned = _plan(paths, "prepare")
    paths.step("prepare").mkdir()
    (paths.step("prepare") / "half").touch()
    paths.progress.write_text("{}")
    assert open_stage(paths, planned) == ""
    assert not paths.step("prepare").exists()
    assert not paths.progress.exists()


def test_state_without_recorded_inputs_is_refused(paths: RunPaths) -> None:
    _train(paths, checkpoints=[4], journal=[])
    with pytest.raises(RunError, match="its inputs are not recorded"):
        open_stage(paths, _plan(paths, "warmup"))


def test_recorded_inputs_are_read_back(paths: RunPaths) -> None:
    planned = _plan(paths, "warmup")
    open_stage(paths, planned)
    assert Inputs(**json.loads(paths.inputs("warmup").read_text())) == planned.inputs
