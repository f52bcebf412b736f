import json
import tomllib
from pathlib import Path
from typing import Any

import miles as package
from tests.cli.conftest import Miles


def test_check_says_what_the_file_means_and_what_to_type_next(miles: Miles) -> None:
    done = miles("config", "check", "run.toml")
    assert done.returncode == 0
    assert "run 'demo' with steps prepare (tiny-task)" in done.stdout
    assert "next: miles submit run.toml --local" in done.stdout


def test_show_prints_the_resolved_file_as_toml_and_json(miles: Miles) -> None:
    shown = tomllib.loads(miles("config", "show", "run.toml", "--set", "seed=9").stdout)
    assert shown["seed"] == 9
    assert shown["steps"]["prepare"]["layers"] == 2
    as_json = json.loads(miles("config", "show", "run.toml", "--set", "seed=9", "--json").stdout)
    assert without_unset(as_json["steps"]["prepare"]) == shown["steps"]["prepare"]


def without_unset(section: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: keys that are not set are not in it."""
    return {
        key: without_unset(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None
    }


def test_explain_prints_meaning_type_and_default(miles: Miles) -> None:
    text = miles("config", "explain", "train.lr").stdout
    assert "Peak learning rate" in text
    assert "1e-06" in text
    assert json.loads(miles("config", "explain", "train.lr", "--json").stdout)["key"] == "train.lr"


def test_init_writes_a_file_once(miles: Miles, directory: Path) -> None:
    done = miles("init", "mine.toml")
    assert done.returncode == 0
    assert "next: " in done.stdout
    text = (directory / "mine.toml").read_text()
    assert "name" in tomllib.loads(text)
    assert miles("init", "mine.toml").returncode == 4
    assert (directory / "mine.toml").read_text() == text


def test_version_names_what_it_runs_on(miles: Miles) -> None:
    versions = json.loads(miles("version", "--json").stdout)
    assert versions["miles"] == package.__version__
    assert versions["torch"]
    assert miles("version").stdout.startswith(f"miles {package.__version__}\n")
