"""What a run does when the disk refuses. Every errno at every kind of write: benchmarks/damage.py."""

import errno

from tests.chaos.refusals import JOURNAL, refuse_journal, refuse_saves
from tests.chaos.rehearsal import Rehearsal


def test_save_that_is_refused_is_logged_and_the_run_goes_on(supervised: Rehearsal) -> None:
    found = [refuse_saves(supervised, number) for number in (errno.ENOSPC, errno.EIO)]
    # Refused in the middle of its file, and only then: the next save succeeds.
    found.append(refuse_saves(supervised, errno.EDQUOT, first=20, last=20))
    assert [refusal for refusal in found if refusal.findings] == []


def test_journal_that_is_refused_stops_the_run_and_the_same_command_continues(rollouts: Rehearsal) -> None:
    writes = [change for change in rollouts.changes if JOURNAL in str(change.path)]
    assert refuse_journal(rollouts, errno.ESTALE, first=len(writes) // 2).findings == []
