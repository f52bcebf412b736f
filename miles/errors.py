"""Errors that people read, by who must act.

Every message states the offending value, the bound it broke and the fix, and names the nearest valid spelling
where one exists. `assert` is for invariants of our own; these classes are for everything else.
The CLI turns a `MilesError` into one panel and its `exit_code`; a traceback appears only with `--debug`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MilesError(Exception):
    """Base class. `message` says what is wrong, `fix` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  fix: {self.fix}"


class ConfigError(MilesError):
    """The run file must change (bad key, type, value or arithmetic)."""

    exit_code = 2


class DataError(MilesError):
    """The prompts, the model directory or a grader must change."""

    exit_code = 3


class RunError(MilesError):
    """The run directory is in a state that does not allow what was asked (in use, finished, unwritable, full)."""

    exit_code = 4


class EngineError(MilesError):
    """An inference engine did not start, died, or answered something unusable."""

    exit_code = 5


class UnknownRouteError(EngineError):
    """An engine of another version does not know an HTTP route."""


class EngineLost(EngineError):
    """An engine is gone or does not answer; another one may take its place."""


class TrainerError(MilesError):
    """A trainer rank failed."""

    exit_code = 6


class RankLost(TrainerError):
    """A trainer rank died and did not say of what."""


class PortTaken(TrainerError):
    """Another program listens where the trainer ranks were to meet; they may meet elsewhere."""


class Interrupted(MilesError):
    """The run was stopped on request; the same command continues it."""

    exit_code = 75


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`" Did you mean 'group_size'?"` for the nearest of `valid`, or an empty string when nothing is near."""
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
