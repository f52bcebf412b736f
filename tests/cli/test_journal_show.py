import json
from pathlib import Path

from runs.journal.journal_records import batch, finished, journal, partial

from tests.cli.conftest import Miles


def make_run(directory: Path) -> None:
    root = directory / "runs/demo"
    root.mkdir(parents=True)
    (root / "run.toml").write_text((directory / "run.toml").read_text())
    log = journal(root)
    log.commit(batch(1, [1, 2]))
    log.flush(2, [partial(finished(9), 10)])


def test_steps_are_a_table(miles: Miles, directory: Path) -> None:
    make_run(directory)
    done = miles("journal", "show", "demo")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["step", "trained", "carried", "dropped"]
    assert lines[1].split()[:3] == ["1", "2", "0"] and "1 zero-variance" in lines[1]
    assert lines[2].split()[-2:] == ["1", "1"]
    assert "next: miles journal show demo --stage grpo --step 2" in done.stdout


def test_groups_of_a_step_are_a_table(miles: Miles, directory: Path) -> None:
    make_run(directory)
    done = miles("journal", "show", "demo", "--step", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:6] == ["9", "a", "0", "1", "open", "-"]
    assert "10…" in done.stdout


def test_json_has_steps_and_groups(miles: Miles, directory: Path) -> None:
    make_run(directory)
    steps = json.loads(miles("journal", "show", "demo", "--json").stdout)
    assert steps["stage"] == "grpo" and [step["tokens"] for step in steps["steps"]] == [160, 20]
    step = json.loads(miles("journal", "show", "demo", "--step", "1", "--json").stdout)
    assert step["step"] == 1 and [group["position"] for group in step["groups"]] == [1, 2]


def test_run_without_a_journal_is_an_error(miles: Miles, directory: Path) -> None:
    make_run(directory)
    done = miles("journal", "show", "demo", "--stage", "gpro")
    assert done.returncode == 4
    assert "Did you mean 'grpo'?" in done.stderr
