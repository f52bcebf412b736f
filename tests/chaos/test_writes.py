"""Killed at a write, a stage that is done again has the same result. Every write: benchmarks/kill_at_every_write.py."""

from tests.chaos.rehearsal import Rehearsal
from tests.chaos.shim import Change
from tests.chaos.sweep import deaths, die_at


def _chosen(stage: Rehearsal, *, name: str, part: str) -> Change:
    """A change by its name and a part of its path; the last of them."""
    return [change for change in stage.changes if change.name == name and part in str(change.path)][-1]


def test_save_that_is_killed(supervised: Rehearsal) -> None:
    deadly = [
        _chosen(supervised, name="fsync", part="/trainer/.metadata"),
        _chosen(supervised, name="rename", part="/checkpoints/warmup/step-000006"),
    ]
    found = [die_at(supervised, change) for change in deadly]
    torn = _chosen(supervised, name="write", part="/trainer/__0_0.distcp")
    found.append(die_at(supervised, torn, torn=True))
    assert [death for death in found if death.findings] == []


def test_journal_that_is_killed(rollouts: Rehearsal) -> None:
    journal = [change for change in rollouts.changes if "/journal/" in str(change.path)]
    renames, writes = ([change for change in journal if change.name == name] for name in ("rename", "write"))
    found = [
        die_at(rollouts, renames[len(renames) // 2]),
        die_at(rollouts, writes[len(writes) // 2], torn=True),
    ]
    assert [death for death in found if death.findings] == []


def test_every_write_is_among_the_deaths(supervised: Rehearsal) -> None:
    chosen, every = deaths(supervised.changes), deaths(supervised.changes, every=True)
    assert {change.number for change, _ in every} == set(range(1, len(supervised.changes) + 1))
    assert {change.path for change, _ in chosen} == {change.path for change in supervised.changes}
    assert any(torn for _, torn in chosen)
