from pathlib import Path

import pytest

from miles.config.load import load_run
from miles.config.schema import RunConfig
from miles.runs.directory import create_run
from miles.runs.paths import RunPaths
from miles.workflow.stage import open_stage
from tests.workflow.training import RUN, finish_until, train


@pytest.fixture
def trained(tmp_path: Path) -> tuple[RunPaths, RunConfig]:
    """A run that ended in the middle of its stage `grpo`: checkpoints of steps 2 and 4, steps to 6 in the journal."""
    (tmp_path / "run.toml").write_text(RUN.format(runs=tmp_path / "runs"))
    config = load_run(tmp_path / "run.toml")
    paths = create_run(config)
    open_stage(paths, finish_until(paths, config, "grpo"))
    train(paths, "grpo", saved=[2, 4], journaled=[3, 4, 5, 6])
    return paths, config
