import os
from dataclasses import replace
from pathlib import Path

import pytest

from miles.config.schema import (
    DataSection,
    EvalSection,
    ModelSection,
    RewardSection,
    RlStep,
    RunConfig,
    TrainSection,
)
from miles.workflow.fingerprint import Inputs, inputs_of, user_files


@pytest.fixture
def step(tmp_path: Path) -> RlStep:
    (tmp_path / "model/nested").mkdir(parents=True)
    for name in ("model/config.json", "model/nested/weights", "train.jsonl", "heldout.jsonl", "grader.py"):
        (tmp_path / name).write_text(name)
    return RlStep(
        kind="rl",
        model=ModelSection(path=str(tmp_path / "model"), tokenizer="step:prepare/model"),
        data=DataSection(path=str(tmp_path / "train.jsonl")),
        rewards=[RewardSection(grader=f"{tmp_path}/grader.py:score"), RewardSection(grader="math")],
        eval=EvalSection(data=DataSection(path=str(tmp_path / "heldout.jsonl"))),
    )


def _inputs(step: RlStep, seed: int = 0, prepare: str = "f00") -> Inputs:
    return inputs_of(RunConfig(name="demo", seed=seed, steps={"train": step}), "train", {"prepare": prepare})


def test_user_files_are_those_of_model_data_evaluation_and_graders(step: RlStep, tmp_path: Path) -> None:
    names = {str(Path(file).relative_to(tmp_path)) for file in user_files(step)}
    assert names == {"model/config.json", "model/nested/weights", "train.jsonl", "heldout.jsonl", "grader.py"}


def test_same_inputs_have_the_same_fingerprint(step: RlStep) -> None:
    first, second = _inputs(step), _inputs(step)
    assert first.fingerprint == second.fingerprint
    assert second.difference(first) == ""


def test_every_input_changes_the_fingerprint_and_is_named(step: RlStep, tmp_path: Path) -> None:
    first = _inputs(step)
    data = tmp_path / "train.jsonl"
    changes = {
        "config changed": [
            _inputs(step, seed=1),
            _inputs(step.model_copy(update={"train": TrainSection(lr=1e-5)})),
        ],
        "step prepare changed": [_inputs(step, prepare="f01")],
        "Miles 0.0.1 -> ": [],
        f"file {data} changed": [],
    }
    old = replace(first, version="0.0.1")
    assert first.difference(old).startswith("Miles 0.0.1 -> ")
    os.utime(data, ns=(1, 1))
    changes[f"file {data} changed"].append(_inputs(step))
    data.unlink()
    changes[f"file {data} changed"].append(_inputs(step))
    for what, changed in changes.items():
        for inputs in changed:
            assert inputs.fingerprint != first.fingerprint
            assert what in inputs.difference(first)
