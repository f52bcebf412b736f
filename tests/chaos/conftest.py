"""Two stages that begin from the same point as often as a test wants, made once: they take longer than most tests."""

from collections.abc import Iterator

import pytest

from miles.runs.paths import RunPaths
from tests.chaos.rehearsal import Rehearsal, rehearse
from tests.chaos.run import STAGE, WARMUP, Case


@pytest.fixture(scope="session")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """A stage that needs no engine: its writes are checkpoints, metrics and the model."""
    with rehearse(Case("fsdp"), WARMUP, tmp_path_factory.mktemp("supervised")) as stage:
        yield stage


@pytest.fixture(scope="session")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """Reinforcement learning with partial rollouts: its writes are those and the journal."""
    case = Case("fsdp", partial=True, steps=4, checkpoint_every=2, eval_every=0, flush_seconds=0.05)
    with rehearse(case, STAGE, tmp_path_factory.mktemp("rollouts")) as stage:
        yield stage


@pytest.fixture(scope="session")
def stopped(rollouts: Rehearsal) -> RunPaths:
    """That stage, killed in its last step: one checkpoint, a batch in the journal and a step that is open."""
    return rollouts.midway("/step-000004/batch-")
