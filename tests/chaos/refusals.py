"""A disk that refuses: what a run must do about it, by what is refused.

A save of the trainer's state that fails is logged and counted, and the run goes on with its last checkpoint and its
journal. A write to the journal that fails stops the run at once. Either way everything that was there before is intact,
and the same command continues when the disk takes writes again.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from miles.errors import RunError
from tests.chaos.rehearsal import Rehearsal
from tests.chaos.shim import ALWAYS

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS)
CHECKPOINTS, JOURNAL = "/checkpoints/", "/journal/"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A stage whose writes were refused, and what was wrong then and afterwards."""

    error: str
    part: str
    first: int
    """The first change below `part` that was refused; all later ones were, too."""
    findings: list[str]


def refuse_saves(stage: Rehearsal, number: int, *, first: int = 1, last: int = ALWAYS) -> Refusal:
    """Run the stage while changes to checkpoints fail with an errno: it ends well all the same, and says so."""
    stage.begin(stage.before)
    stage.shim.arm(first, last, action=number, part=CHECKPOINTS)
    code = stage.run()
    refused = stage.shim.count() >= first
    stage.shim.arm()
    findings = []
    if code:
        findings.append(f"exit code {code}\n{stage.message()}")
    elif refused:
        findings += _unsaid(stage, number)
        # A disk that takes nothing any more neither has the last checkpoint nor lets go of its draft.
        findings += [text for text in stage.findings() if "no checkpoint" not in text and ".draft-" not in text]
    return Refusal(errno.errorcode[number], CHECKPOINTS, first, findings)


def refuse_journal(stage: Rehearsal, number: int, *, first: int = 1) -> Refusal:
    """Run the stage while changes to the journal fail with an errno: it stops; when they succeed again, it goes on."""
    stage.begin(stage.before)
    stage.shim.arm(first, ALWAYS, action=number, part=JOURNAL)
    code = stage.run()
    refused = stage.shim.count() >= first
    stage.shim.arm()
    findings = []
    if refused and code != RunError.exit_code:
        findings.append(f"exit code {code} in place of {RunError.exit_code}\n{stage.message()}")
    if refused:
        findings += _unsaid(stage, number)
    if again := stage.run():
        findings.append(f"exit code {again} when the disk was well again\n{stage.message()}")
    else:
        findings += stage.findings()
    return Refusal(errno.errorcode[number], JOURNAL, first, findings)


def _unsaid(stage: Rehearsal, number: int) -> list[str]:
    message = stage.message()
    found = [] if os.strerror(number) in message else [f"nothing says '{os.strerror(number)}'\n{message}"]
    return found + (["a traceback in the log\n" + message] if "Traceback" in message else [])
