"""What may change in a run that exists, and what a step's results depend on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from miles.config.base import Mark
from miles.config.changes import config_changes, lasting_values
from miles.config.fields import SECTIONS, all_keys
from miles.config.load import load_run

FILE = """
name = "r"
model = "hf"
data = "prompts.jsonl"
train.lr_schedule = "{schedule}"
[steps.train]
kind = "rl"
"""


def _changes(write: Callable[..., Path], *overrides: str, schedule: str = "constant") -> dict[str, bool]:
    file = write(FILE.format(schedule=schedule))
    return {change.key: change.allowed for change in config_changes(load_run(file), load_run(file, overrides))}


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("tracking.wandb_project=p", True),
        ("checkpoint.keep_last=9", True),
        ("journal.keep=all", True),
        ("local.time_limit_minutes=30", True),
        ("engine.hang_timeout=9.0", True),
        ("rollout.max_quarantined=99", True),
        ("rollout.over_sampling=1.5", False),
        ("rollout.group_size=4", False),
        ("algorithm.kl_coef=0.1", False),
        ("train.recompute=true", True),
        ("train.lr=1e-3", False),
        ("engine.dtype=float32", False),
        ("data.shuffle=false", False),
    ],
)
def test_a_marked_key_may_change(write: Callable[..., Path], override: str, allowed: bool) -> None:
    key = override.partition("=")[0]
    assert _changes(write, override) == {f"steps.train.{key}": allowed}


def test_keys_inside_a_list_of_tables_are_judged_one_by_one(write: Callable[..., Path]) -> None:
    changes = _changes(write, 'rewards=[{grader = "math", timeout = 5.0}]')
    assert changes == {"steps.train.rewards[0].grader": False, "steps.train.rewards[0].timeout": True}


def test_a_list_that_grows_may_not_change(write: Callable[..., Path]) -> None:
    changes = _changes(write, 'rewards=[{grader = "exact"}, {grader = "math"}]')
    assert changes["steps.train.rewards[1].grader"] is False


@pytest.mark.parametrize(
    ("steps", "schedule", "allowed"), [(101, "constant", True), (99, "constant", False), (101, "cosine", False)]
)
def test_steps_may_grow_while_the_rate_does_not_depend_on_them(
    write: Callable[..., Path], steps: int, schedule: str, allowed: bool
) -> None:
    assert _changes(write, f"train.steps={steps}", schedule=schedule) == {"steps.train.train.steps": allowed}


def test_another_step_or_kind_may_not_change(write: Callable[..., Path]) -> None:
    old = load_run(write(FILE.format(schedule="constant")))
    new = load_run(write(FILE.format(schedule="constant") + '[steps.second]\nkind = "report"\nneeds = []\n'))
    changes = config_changes(old, new)
    assert changes
    assert not any(change.allowed for change in changes)


def test_results_depend_on_every_key_that_is_not_marked(write: Callable[..., Path]) -> None:
    step = load_run(write(FILE.format(schedule="cosine"))).steps["train"]
    lasting = lasting_values(step)
    for key in all_keys():
        section, _, name = key.name.partition(".")
        if section in SECTIONS and "rl" in key.kinds and "." not in name and section != "rewards":
            assert (name in lasting[section]) == (Mark.MAY_CHANGE not in key.field.metadata), key.name
    assert lasting["rewards"] == [{"grader": "exact", "weight": 1.0, "args": {}, "on_error": "stop"}]
