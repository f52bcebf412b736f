"""`Check`: what `miles doctor` found about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check went."""

    OK = "ok"
    WARN = "warn"
    """Runs work, with a limitation that the message names."""
    FAIL = "fail"
    """Runs do not work here."""
    SKIP = "skip"
    """There is nothing to check."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    message: str
    remedy: str = ""
    """What to do about a warning or a failure."""
