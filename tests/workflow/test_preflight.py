"""Which inputs can be looked at before a run; what is found in them is in tests/test_error_catalogue.py."""

from pathlib import Path

from miles.config.schema import (
    DataSection,
    EvalSection,
    EvalStep,
    ModelSection,
    RewardSection,
    RlStep,
    RunConfig,
    SftStep,
    TinyTaskStep,
)
from miles.runs.paths import RunPaths
from miles.workflow.preflight import check_inputs, first_model, has_own_inputs, what_is_read

PROMPTS = DataSection(path="step:prepare/train.jsonl")


def config(**steps) -> RunConfig:
    return RunConfig(name="r", steps={"prepare": TinyTaskStep(kind="tiny-task"), **steps})


def test_model_of_an_earlier_step_is_followed_to_the_users_own():
    warmup = SftStep(kind="sft", model=ModelSection(path="/hf"), data=PROMPTS)
    train = RlStep(kind="rl", model=ModelSection(path="step:warmup/model", trust_remote_code=True), data=PROMPTS)
    run = config(warmup=warmup, train=train)
    assert first_model(train, run) == ModelSection(path="/hf", trust_remote_code=True)


def test_model_that_a_step_builds_is_not_known_before():
    warmup = SftStep(kind="sft", model=ModelSection(path="step:prepare/model"), data=PROMPTS)
    train = RlStep(kind="rl", model=ModelSection(path="step:warmup/model"), data=PROMPTS)
    run = config(warmup=warmup, train=train)
    assert first_model(train, run) is None
    assert not has_own_inputs(run, "train") and not has_own_inputs(run, "prepare")


def test_runs_of_a_sweep_are_told_apart_by_what_the_check_reads_alone():
    def read(**changes):
        step = RlStep(kind="rl", model=ModelSection(path="/hf"), data=PROMPTS)
        sections = {name: getattr(step, name).model_copy(update=values) for name, values in changes.items()}
        return what_is_read(config(train=step.model_copy(update=sections)), "train")

    assert read() == read(train={"lr": 0.5}) == read(checkpoint={"every": 7}) == read(algorithm={"clip_low": 0.5})
    for section, key in (("data", "path"), ("rollout", "max_response_tokens"), ("train", "max_tokens_per_micro_batch")):
        assert read() != read(**{section: {key: "9"}})


def test_any_file_model_or_grader_of_the_users_is_looked_at():
    built = ModelSection(path="step:prepare/model")
    own = DataSection(path="/heldout.jsonl")
    run = config(
        data=SftStep(kind="sft", model=built, data=own),
        heldout=EvalStep(kind="eval", model=built, eval=EvalSection(data=own)),
        grader=RlStep(kind="rl", model=built, data=PROMPTS, rewards=[RewardSection(grader="g.py:grade")]),
        model=RlStep(kind="rl", model=ModelSection(path="/hf"), data=PROMPTS),
    )
    assert all(has_own_inputs(run, name) for name in ("data", "heldout", "grader", "model"))


def test_run_without_own_inputs_starts_no_process(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere")
    check_inputs(config(), RunPaths(tmp_path), ["prepare"])
