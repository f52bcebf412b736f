"""Whatever stands in a run file, the answer is a config or an error that a person can act on, never a traceback."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from miles.config.fields import SECTIONS, all_keys
from miles.config.load import load_run
from miles.config.problems import InvalidConfigError

BASE = """
name = "r"
model = "hf"
data = "prompts.jsonl"
[[rewards]]
grader = "math"
[train]
lr = 1.0
[eval]
data = "prompts.jsonl"
[steps.prepare]
kind = "tiny-task"
[steps.train]
kind = "rl"
needs = ["prepare"]
model = "step:prepare/model"
train = { steps = 3 }
[steps.report]
kind = "report"
"""

WORDS = st.sampled_from(
    ["", "rl", "sft", "eval", "step:", "step:x/y", "step:train/model", "step:prepare/model", "hf", "exact", "a:b"]
)
LEAVES = st.one_of(st.booleans(), st.integers(-2, 9), st.floats(), WORDS, st.dates())
KEYS = st.sampled_from(
    ["name", "steps", "kind", "needs", "path", "more", "a b", *SECTIONS, *(key.last for key in all_keys())]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)
PLACES = st.sampled_from(
    [
        (),
        ("train",),
        ("eval",),
        ("eval", "data"),
        ("steps",),
        ("steps", "prepare"),
        ("steps", "train"),
        ("steps", "train", "train"),
    ]
)


def changed(place: tuple[str, ...], key: str, value: Any) -> str:
    """BASE with one value put into one of its tables."""
    data: dict[str, Any] = tomllib.loads(BASE)
    table = data
    for part in place:
        if not isinstance(table.get(part), dict):
            table[part] = {}
        table = table[part]
    table[key] = value
    return tomli_w.dumps(data)


@given(PLACES, KEYS, VALUES)
@example((), "steps", [{"kind": "rl"}])
@example((), "steps", {"train": 3})
@example(("steps", "train"), "kind", {"rl": 1})
@example(("steps", "train"), "needs", [["prepare"]])
@example(("steps", "train"), "rewards", [{"grader": 3}, 4])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_a_file_gives_a_config_or_problems_with_fixes(
    folder: Path, place: tuple[str, ...], key: str, value: Any
) -> None:
    Path("run.toml").write_text(changed(place, key, value))
    try:
        load_run("run.toml")
    except InvalidConfigError as error:
        assert all(problem.message and problem.fix for problem in error.problems)
        assert "pydantic" not in str(error)


@pytest.mark.parametrize("key", [key.name for key in all_keys() if key.home in SECTIONS])
def test_a_date_is_no_value_of_any_key(key: str, folder: Path) -> None:
    section, _, rest = key.partition(".")
    path = ("rewards", "0", rest) if section == "rewards" else (section, *rest.split("."))
    data: dict[str, Any] = tomllib.loads(BASE)
    table: Any = data
    for part in path[:-1]:
        if isinstance(table, dict) and isinstance(table.get(part, {}), str):
            table[part] = {"path": table[part]}
        table = table[int(part)] if part.isdigit() else table.setdefault(part, {})
    table[path[-1]] = tomllib.loads("d = 2020-01-01")["d"]
    Path("run.toml").write_text(tomli_w.dumps(data))
    with pytest.raises(InvalidConfigError) as caught:
        load_run("run.toml")
    assert "2020-01-01 is a date: " in str(caught.value)
    assert len(caught.value.problems) == 1
