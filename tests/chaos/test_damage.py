"""A stage continues from older state when files of its state are damaged. Every file: benchmarks/damage.py."""

from pathlib import Path

import pytest

from miles.errors import RunError
from miles.runs.paths import RunPaths
from tests.chaos.damage import DAMAGES, needed_files, survive
from tests.chaos.rehearsal import Rehearsal
from tests.chaos.run import STAGE


@pytest.mark.parametrize(("pattern", "damage"), [("**/batch-*.h5", "bit flipped"), ("**/segment-*.h5", "truncated")])
def test_damaged_journal_is_named_and_generated_again(
    rollouts: Rehearsal, stopped: RunPaths, pattern: str, damage: str
) -> None:
    file = next(path for path in needed_files(stopped, STAGE) if path.match(pattern))
    assert survive(rollouts, stopped, file, damage).findings == []


def test_damage_of_the_only_checkpoint_stops_with_the_command_that_accepts_the_loss(
    rollouts: Rehearsal, stopped: RunPaths
) -> None:
    rollouts.begin(stopped)
    checkpoint = next(rollouts.paths.checkpoints(STAGE).iterdir())
    DAMAGES["bit flipped"](checkpoint / "trainer" / "__0_0.distcp")
    assert rollouts.run() == RunError.exit_code
    message = rollouts.message()
    assert "no checkpoint of 'grpo' is intact" in message and "__0_0.distcp: checksum" in message
    assert "`miles resume proof --stage grpo --from start`" in message
    assert checkpoint.exists(), "nothing is moved before somebody accepts the loss"


def test_damaged_newest_checkpoint_is_set_aside(supervised: Rehearsal) -> None:
    midway = supervised.midway("/.draft-000008")
    newest = Path("checkpoints/warmup/step-000006")
    for damage, file in (("truncated", newest / "trainer" / "__0_0.distcp"), ("emptied", newest / "manifest.json")):
        assert survive(supervised, midway, file, damage).findings == []
