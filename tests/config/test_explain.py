"""What `config explain`, the reference page and `miles init` say, against the schema that they describe."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from miles.config.explain import explain, reference_markdown
from miles.config.fields import SECTIONS, STEP_KINDS, all_keys, section_type
from miles.config.files import preset_names
from miles.config.load import load_run
from miles.config.template import EXAMPLES, LIVE, commented_config
from miles.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_a_key_is_explained_with_type_bound_default_and_home() -> None:
    explanation = explain("train.lr")
    assert (explanation.type, explanation.bounds, explanation.default) == ("number", "> 0", "1e-06")
    assert explanation.text == "Peak learning rate."
    assert explanation.written_in == (
        "[train] lr: default of every step of kind sft or rl",
        "[steps.NAME.train] lr: for one step",
    )


@pytest.mark.parametrize("spelling", ["lr", "train.lr", "steps.warmup.train.lr"])
def test_a_key_is_found_under_every_name(spelling: str) -> None:
    assert explain(spelling) == explain("train.lr")


@pytest.mark.parametrize("key", [key.name for key in all_keys()])
def test_every_key_is_documented(key: str) -> None:
    assert len(explain(key).text) > 3


@pytest.mark.parametrize("name", [*SECTIONS, *STEP_KINDS, "extends", "steps"])
def test_every_section_and_kind_is_explained(name: str) -> None:
    assert explain(name).text.endswith(".")


def test_bounds_of_whole_numbers_and_lists_are_inclusive() -> None:
    assert explain("group_size").bounds == ">= 1"
    assert explain("pass_at").bounds == ">= 1"
    assert explain("adam_beta1").bounds == ">= 0 and < 1"


def test_a_name_of_several_keys_lists_them() -> None:
    with pytest.raises(ConfigError, match=r"several keys: train\.dtype, engine\.dtype"):
        explain("dtype")


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'train\.lrr' is not a key of the run file\. Did you mean 'train\.lr'"):
        explain("train.lrr")


def test_the_sections_are_those_of_the_steps() -> None:
    found = {
        name: section
        for step in STEP_KINDS.values()
        for name, field in step.model_fields.items()
        if (section := section_type(field.annotation))
    }
    assert found == SECTIONS


def test_the_reference_page_is_current() -> None:
    page = ROOT / "docs" / "reference" / "config.md"
    assert page.read_text() == reference_markdown(), (
        "write it again: python -c 'from miles.config.explain import reference_markdown as r; "
        f'print(r(), end="")\' > {page.relative_to(ROOT)}'
    )


def test_the_file_that_init_writes_loads(folder: Path, write: Callable[..., Path]) -> None:
    config = load_run(write(commented_config("first", "hf", "prompts.jsonl")))
    assert config == load_run(write('name = "first"\nmodel = "hf"\ndata = "prompts.jsonl"'))


def test_the_file_that_init_writes_shows_every_key_of_every_section() -> None:
    text = commented_config()
    shown = [key for key in all_keys() if key.home in SECTIONS and key.home != "model"]
    assert [key.name for key in shown if f"{key.last} = " not in text] == []
    assert set(LIVE) | set(EXAMPLES) <= {key.name for key in shown}


@pytest.mark.parametrize("preset", preset_names())
def test_the_file_that_init_writes_undoes_no_preset(folder: Path, write: Callable[..., Path], preset: str) -> None:
    text = commented_config("first", "hf", "prompts.jsonl")
    start = f'extends = "preset:{preset}"\n'
    short = write(start + 'name = "first"\nmodel = "hf"\ndata = "prompts.jsonl"')
    assert load_run(write(start + text)) == load_run(short)


def test_comments_of_the_file_that_init_writes_are_toml_too() -> None:
    lines = [line.removeprefix("# ") for line in commented_config().splitlines() if " = " in line]
    assignments = [line for line in lines if line.split(" = ")[0].isidentifier() and "<" not in line]
    assert len(assignments) > 50
    for line in assignments:
        tomllib.loads(line)
