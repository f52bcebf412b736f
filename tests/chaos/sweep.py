"""A stage that is killed at each change that it makes to the run directory in turn, and done again after each.

Owns the order of things and which changes stand for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from tests.chaos.rehearsal import Rehearsal
from tests.chaos.shim import KILL, TORN, Change


@dataclass(frozen=True, slots=True)
class Death:
    """A stage that died at one change, and what was wrong after it had been done again."""

    number: int
    change: str
    torn: bool
    """Half of a write was on the disk."""
    findings: list[str]


def die_at(stage: Rehearsal, change: Change, *, torn: bool = False) -> Death:
    """Begin the stage, kill it at its change of this number, do it again, and compare.

    How often progress is written depends on timing: it may be another change than the undisturbed stage's.
    """
    stage.begin(stage.before)
    stage.shim.arm(change.number, action=TORN if torn else KILL)
    code = stage.run()
    changes = stage.shim.changes()
    stage.shim.arm()
    if code == 0:
        return Death(change.number, "the stage ended before", torn, [])
    findings = [] if code == -9 else [f"exit code {code} when it was killed\n{stage.message()}"]
    if again := stage.run():
        findings.append(f"exit code {again} when it was done again\n{stage.message()}")
    else:
        findings += stage.findings()
    return Death(change.number, str(changes[change.number - 1]), torn, findings)


PROGRESS = "progress.json"
PROGRESS_EVERY = 7
"""A rewrite is 5 changes, so that each of them has its turn."""


def deaths(changes: list[Change], *, every: bool = False) -> list[tuple[Change, bool]]:
    """Where to die, and whether in the middle of a write: at every change.

    Unless `every`, of several writes to one file in a row only at the first, in the middle of the middle one and at
    the last. The others leave the same: a file with another part of its bytes, which nothing refers to yet. And of the
    rewrites of progress.json, which no continuing command reads, only every seventh change.
    """
    found: list[tuple[Change, bool]] = []
    progress = [change for change in changes if PROGRESS in change.path.name]
    if not every:
        skipped = set(progress) - set(progress[::PROGRESS_EVERY])
        changes = [change for change in changes if change not in skipped]
    for (name, _), run in groupby(changes, key=lambda change: (change.name, change.path)):
        same = list(run)
        if name in ("write", "pwrite", "writev"):
            found += [(change, True) for change in (same if every else [same[len(same) // 2]])]
            same = same if every or len(same) == 1 else [same[0], same[-1]]
        found += [(change, False) for change in same]
    return sorted(found, key=lambda death: (death[0].number, death[1]))
