"""What the journal holds, as values: the decision of a step, and what is known of a step without one.

Owns the records only; how they become bytes belongs to `miles.runs.journal.codec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.data.sample import Group

DropReason = Literal["zero-variance", "quarantined"]
"""Why nobody trains on a group: its rewards are all the same, or it failed too often."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A position that was drawn and is not trained on."""

    position: int
    prompt_id: str
    reason: DropReason
    detail: str = ""
    """For people: the reward of all samples, or the error."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The decision of one step. With the weights after it, it is all that the next step depends on.

    A position is in one of the three lists at most.
    """

    step: int
    groups: list[Group]
    """Trained on, in the order of the batch."""
    carried: list[Group]
    """Kept for later steps; partial or finished."""
    dropped: list[Dropped]
    cursor: int
    """The first position that was not drawn yet."""
    quarantined_total: int = 0
    """Groups quarantined in this step and all before."""


@dataclass(frozen=True, slots=True)
class OpenStep:
    """What the segments of a step hold. Empty when it has none, or has a batch."""

    groups: list[Group]
    """By position. Those dropped are among them, as far as they were flushed."""
    dropped: list[Dropped]
    """By position."""
