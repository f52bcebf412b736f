"""Errors are one panel on stderr, with an exit code that says who must act."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Miles


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("submit run.toml", 2, ["there is no sbatch in PATH", "submit run.toml --local"]),
        ("submit missing.toml --local", 2, ["missing.toml"]),
        ("submit run.toml --local --set steps.prepare.layer=3", 2, ["Did you mean", "layers"]),
        ("config check missing.toml", 2, ["missing.toml"]),
        ("config explain trian.lr", 2, ["Did you mean 'train.lr'"]),
        ("status", 4, ["there is no run under", "miles submit"]),
        ("watch nothing", 4, ["there is no run 'nothing'", "miles runs"]),
        ("stop nothing", 4, ["there is no run 'nothing'"]),
        ("init run.toml", 4, ["run.toml exists", "miles init FILE"]),
        ("init no/such/directory/run.toml", 4, ["no/such/directory/run.toml"]),
    ],
)
def test_user_error_is_one_panel(miles: Miles, arguments: str, code: int, words: list[str]) -> None:
    done = miles(*arguments.split())
    assert done.returncode == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[0].startswith("╭─ error")
    assert done.stderr.count("╭─") == 1
    flat = " ".join(done.stderr.replace("│", " ").split())
    for word in words:
        assert word in flat


def test_usage_error_has_exit_code_2_and_names_the_nearest(miles: Miles) -> None:
    done = miles("statsu")
    assert done.returncode == 2
    assert "status" in done.stderr


@pytest.mark.parametrize("arguments", [("--debug", "status"), ("status", "--debug")])
def test_debug_shows_the_traceback(miles: Miles, arguments: tuple[str, ...]) -> None:
    done = miles(*arguments)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "there is no run under" in done.stderr


def test_fault_of_our_own_is_a_panel_that_says_so(miles: Miles, directory: Path) -> None:
    run = directory / "runs/broken"
    run.mkdir(parents=True)
    (run / "run.toml").symlink_to(directory / "run.toml")
    (run / "claims").mkdir()
    (run / "claims/000001.json").write_text("not JSON")
    done = miles("status", "broken")
    assert done.returncode == 1
    assert "fault of Miles" in done.stderr
    assert "--debug" in done.stderr


def test_json_of_an_empty_directory_is_an_empty_list(miles: Miles) -> None:
    done = miles("runs", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == []
