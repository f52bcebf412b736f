"""Going on with a run, from where it is, from an earlier step, and beside it."""

import json
from pathlib import Path

import pytest

from miles.config.load import load_resolved, load_run
from miles.runs.attempts import read_attempts
from miles.runs.directory import create_run
from miles.runs.paths import RunPaths
from miles.workflow.stage import open_stage, read_state
from tests.cli.conftest import Miles
from tests.error_catalogue.command import run_all
from tests.workflow.training import RUN, finish_until, train


@pytest.fixture
def stopped(directory: Path) -> RunPaths:
    """A run that ended in the middle of its stage `grpo`."""
    (directory / "training.toml").write_text(RUN.format(runs=directory / "runs"))
    config = load_run(directory / "training.toml")
    paths = create_run(config)
    open_stage(paths, finish_until(paths, config, "grpo"))
    train(paths, "grpo", saved=[2, 4], journaled=[3, 4, 5, 6])
    return paths


def test_run_is_forked_and_the_fork_resumed(miles: Miles, directory: Path) -> None:
    assert miles("submit", "run.toml", "--local").returncode == 0
    resumed = miles("resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "run 'demo' is done" in resumed.stdout
    assert len(read_attempts(RunPaths(directory / "runs/demo"))) == 1

    forked = miles("fork", "demo", "second", "--set", "seed=5")
    assert forked.returncode == 0, forked.stderr
    assert "changed: seed: 0 in the run, 5 now" in forked.stdout
    assert "next: miles resume second" in forked.stdout
    resumed = miles("resume", "second")
    assert resumed.returncode == 0, resumed.stderr
    assert "step prepare: starts from its beginning" in resumed.stdout
    assert "second: 1 of 1 steps done" in resumed.stdout
    assert load_resolved(directory / "runs/second").seed == 5
    assert miles("fork", "demo", "second").returncode == 4


REFUSED = [
    ("resume --from 3 --yes", 4, "'grpo' has no checkpoint of step 3; the nearest: step 2 and step 4"),
    ("resume --from 2", 2, "nobody is here to agree to that fix: say --yes"),
    ("resume --from last", 2, "--from last: neither a step nor 'start'"),
    ("resume --stage grpo", 2, "--stage says which stage --from means"),
    ("resume --restart grpo --from 2", 2, "--restart names a stage itself"),
    ("resume --restart gpro", 4, "no stage 'gpro'. Did you mean 'grpo'?"),
    ("resume --set train.lr=1e-3", 4, "steps.grpo.train.lr: 1e-06 in the run, 0.001 now"),
    ("resume --set trian.lr=1e-3", 2, "unknown key 'trian'"),
    ("fork demo second --from 3", 4, "no checkpoint of step 3"),
    ("fork demo second --set train.lr=1e-3", 4, "made from the output of 'warmup', which would run again"),
    ("save", 4, "run 'demo' is not running"),
    ("export demo run.toml", 4, "run.toml exists"),
    ("export demo out --from 3", 4, "no checkpoint of step 3"),
]


def test_what_cannot_be_done_changes_nothing(stopped: RunPaths, directory: Path) -> None:
    before = sorted(directory.rglob("*"))
    results = run_all([(directory, arguments.split()) for arguments, _, _ in REFUSED])
    for (arguments, code, words), done in zip(REFUSED, results, strict=True):
        assert (arguments, done.code) == (arguments, code)
        assert words in done.panel
    assert sorted(directory.rglob("*")) == before


def test_going_back_says_what_is_set_aside(miles: Miles, stopped: RunPaths) -> None:
    # The stage cannot start: its model is made up. What it would go on from is told before.
    done = miles("resume", "--from", "step-000002", "--yes")
    assert done.returncode != 0
    assert "'grpo' goes back to its checkpoint of step 2" in done.stdout
    assert "set aside: training steps 3 to 6 of 'grpo'" in done.stdout
    assert "step grpo: continues after step 2" in done.stdout
    assert read_state(stopped, "grpo").step == 2


def test_checkpoints_are_listed(miles: Miles, stopped: RunPaths) -> None:
    listed = miles("checkpoints", "--verify")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:4]] == [
        ["warmup", "4"],
        ["grpo", "2"],
        ["grpo", "4"],
    ]
    assert "next: miles resume demo --stage grpo --from 4" in listed.stdout
    (stopped.checkpoints("grpo") / "step-000002/trainer/state").write_text("short")
    (damaged,) = [saved for saved in json.loads(miles("checkpoints", "--json").stdout) if saved["damage"]]
    assert (damaged["stage"], damaged["step"]) == ("grpo", 2)
    assert "trainer/state" in damaged["damage"][0]


def test_run_without_stages_has_no_checkpoints(miles: Miles, directory: Path) -> None:
    create_run(load_run(directory / "run.toml", [f'runs_dir="{directory}/runs"']))
    assert "has no checkpoints" in miles("checkpoints").stdout
    assert miles("checkpoints", "--json").stdout == "[]\n"
