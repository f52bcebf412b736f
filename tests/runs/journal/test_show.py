from pathlib import Path

import pytest
from journal_records import batch, finished, journal, partial

from miles.errors import RunError
from miles.runs.journal import Dropped
from miles.runs.journal.show import find_stage, show_step, show_steps
from miles.runs.paths import RunPaths


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run with a decided step and an open one."""
    log = journal(tmp_path)
    log.commit(batch(2, [1, 2], carried=[partial(finished(9), 10)]))
    log.flush(3, [partial(finished(9), 20)])
    log.flush(3, [partial(finished(9), 30)], [Dropped(11, "a", "quarantined", "timed out")])
    return RunPaths(tmp_path)


def test_decided_step_is_counted(paths: RunPaths) -> None:
    row = show_steps(paths, "grpo")[0]
    assert (row.step, row.decided, row.trained, row.carried, row.open) == (2, True, 2, 1, 0)
    assert row.dropped == {"zero-variance": 1}
    # Two groups of two samples, half of whose 40 tokens are of version 0; step 2 begins with version 1.
    assert (row.tokens, row.off_policy_tokens) == (160, 80)
    (file,) = paths.journal("grpo").glob("step-000002/batch-*.h5")
    assert row.bytes == file.stat().st_size
    assert row.bytes_per_token == row.bytes / 180
    assert row.damaged == []


def test_open_step_is_counted(paths: RunPaths) -> None:
    row = show_steps(paths, "grpo")[1]
    assert (row.step, row.decided, row.trained, row.carried, row.open, row.segments) == (3, False, 0, 0, 1, 2)
    assert (row.tokens, row.dropped) == (60, {"quarantined": 1})


def test_groups_of_a_step_come_with_what_happened_to_them(paths: RunPaths) -> None:
    first, _, carried = show_step(paths, "grpo", 2).groups
    assert (first.position, first.prompt_id, first.staleness, first.fate) == (1, "a", 1, "trained")
    assert (first.rewards, first.lengths, first.weight_versions) == ([0.0, 1.0], [40, 40], [0, 1])
    assert first.finish_reasons == ["stop", "stop"]
    assert (carried.fate, carried.rewards, carried.finish_reasons) == ("carried", [None, None], [None, None])


def test_damage_is_named_and_left_where_it_is(paths: RunPaths) -> None:
    (file,) = paths.journal("grpo").glob("step-000002/batch-*.h5")
    file.write_bytes(b"")
    row = show_steps(paths, "grpo")[0]
    assert not row.decided and row.trained == 0
    assert len(row.damaged) == 1 and file.name in row.damaged[0]
    assert file.exists()


def test_unknown_step_and_stage_name_those_that_there_are(paths: RunPaths) -> None:
    with pytest.raises(RunError, match=r"has no step 7; it has steps 2 to 3"):
        show_step(paths, "grpo", 7)
    with pytest.raises(RunError, match=r"no journal of 'gpro'. Did you mean 'grpo'\?"):
        find_stage(paths, "gpro")


def test_stage_must_be_said_where_there_are_two(paths: RunPaths, tmp_path: Path) -> None:
    assert find_stage(paths, None) == "grpo"
    paths.journal("second").mkdir()
    with pytest.raises(RunError, match=r"journals of grpo, second\n.*--stage second"):
        find_stage(paths, None)
    with pytest.raises(RunError, match="has no journal"):
        find_stage(RunPaths(tmp_path / "other"), None)
