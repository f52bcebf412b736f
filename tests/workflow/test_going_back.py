from pathlib import Path

import pytest

from miles.config.load import load_run
from miles.config.schema import RunConfig
from miles.errors import ConfigError, RunError
from miles.runs.claim import Claim
from miles.runs.directory import create_run
from miles.runs.manifest import DamagedError
from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths
from miles.workflow.going_back import choose_stage, go_back, parse_step, plan_going_back, steps_after, steps_before
from miles.workflow.plan import plan_run
from miles.workflow.stage import open_stage, opening_note, read_state
from tests.workflow.training import RUN, finish_until


def _to_do(paths: RunPaths, config: RunConfig) -> list[str]:
    return [planned.name for planned in plan_run(config, paths) if planned.done is None]


@pytest.mark.parametrize(("text", "step"), [("40", 40), ("step-000040", 40), ("start", 0)])
def test_step_is_a_number_a_directory_or_the_beginning(text: str, step: int) -> None:
    assert parse_step(text) == step


@pytest.mark.parametrize("text", ["", "last", "step-", "-4", "4.0", "²"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a step nor 'start'"):
        parse_step(text)


def test_stage_is_the_last_that_trained_unless_it_is_named(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, config = trained
    assert choose_stage(paths, config, None) == "grpo"
    assert choose_stage(paths, config, "warmup") == "warmup"
    with pytest.raises(RunError, match=r"no stage 'warmpu'\. Did you mean 'warmup'"):
        choose_stage(paths, config, "warmpu")
    with pytest.raises(RunError, match="no stage 'prepare'"):
        choose_stage(paths, config, "prepare")


def test_run_that_trained_nothing_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN.format(runs=tmp_path))
    config = load_run(tmp_path / "run.toml")
    with pytest.raises(RunError, match="no trained step"):
        choose_stage(create_run(config), config, None)


def test_order_of_steps_goes_through_others(trained: tuple[RunPaths, RunConfig]) -> None:
    _, config = trained
    assert steps_after(config, "prepare") == ["warmup", "grpo", "report"]
    assert steps_after(config, "report") == []
    assert steps_before(config, "grpo") == ["prepare", "warmup"]


def test_stage_goes_on_from_the_checkpoint(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, config = trained
    plan = plan_going_back(paths, config, "grpo", 2)
    assert plan.set_aside == ["training steps 3 to 6 of 'grpo'"]
    assert read_state(paths, "grpo").step == 6, "a plan changes nothing"
    go_back(paths, plan)
    assert read_state(paths, "grpo").step == 2
    assert [line.step for line in read_metrics(paths) if line.stage == "grpo"] == [1, 2]
    assert _to_do(paths, config) == ["grpo", "report"]
    (aside,) = paths.discarded.iterdir()
    assert (aside / "checkpoints/step-000004/manifest.json").exists()
    assert (aside / "journal/step-000006").exists()


def test_newest_checkpoint_sets_the_journal_after_it_aside(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, config = trained
    go_back(paths, plan_going_back(paths, config, "grpo", 4))
    assert str(read_state(paths, "grpo")) == "step 4"


def test_going_back_in_a_stage_that_is_done_makes_the_steps_after_it_run_again(
    trained: tuple[RunPaths, RunConfig],
) -> None:
    paths, config = trained
    plan = plan_going_back(paths, config, "warmup", 0)
    assert plan.set_aside == [
        "training steps 1 to 4 of 'warmup'",
        "the outputs of 'grpo', which was made from 'warmup'",
    ]
    go_back(paths, plan)
    assert [read_state(paths, stage).step for stage in ("warmup", "grpo")] == [0, 0]
    assert read_metrics(paths) == []
    planned = {planned.name: planned for planned in plan_run(config, paths)}
    assert _to_do(paths, config) == ["warmup", "grpo", "report"]
    assert opening_note(paths, planned["warmup"]) == ""
    assert open_stage(paths, planned["grpo"]) == ""


def test_last_checkpoint_of_a_stage_that_is_done_repeats_only_its_end(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN.format(runs=tmp_path))
    config = load_run(tmp_path / "run.toml")
    paths = create_run(config)
    finish_until(paths, config, "grpo")
    go_back(paths, plan_going_back(paths, config, "warmup", 4))
    assert _to_do(paths, config) == ["warmup", "grpo", "report"]
    assert read_state(paths, "warmup").step == 4
    assert not paths.discarded.exists()


def test_checkpoint_that_is_not_there_or_damaged_is_refused(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, config = trained
    with pytest.raises(RunError, match="no checkpoint of step 3; the nearest: step 2 and step 4"):
        plan_going_back(paths, config, "grpo", 3)
    (paths.checkpoints("grpo") / "step-000002/trainer/state").write_text("short")
    with pytest.raises(DamagedError):
        plan_going_back(paths, config, "grpo", 2)


def test_run_in_use_does_not_go_back(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, config = trained
    plan = plan_going_back(paths, config, "grpo", 2)
    with Claim.acquire(paths), pytest.raises(RunError, match="in use"):
        go_back(paths, plan)
    assert read_state(paths, "grpo").step == 6
