"""`Problem`: one thing wrong with a run file, and `InvalidConfigError`, the error that carries all of them.

Owns how problems read. What is wrong is found by `miles.config.validate`, `rules` and `model_checks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from miles.config.positions import KeyPath
from miles.config.source import Place, quoted
from miles.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem before it is known where its keys were written."""

    keys: tuple[KeyPath, ...]
    """Keys that take part, the one to point at first; relative to the step or run that was checked."""
    message: str
    fix: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a run file."""

    place: Place
    message: str
    """Key, value and the bound it broke."""
    fix: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}\n    fix: {self.fix}"


class InvalidConfigError(ConfigError):
    """Everything that is wrong with a run file, in the order of the file."""

    def __init__(self, file: str, problems: Iterable[Problem]) -> None:
        unique = dict.fromkeys(problems)
        self.problems = tuple(sorted(unique, key=lambda p: (p.place.source != file, p.place.source, p.place.line)))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in {file}\n" + "\n".join(map(str, self.problems)))


def shown(value: Any) -> str:
    """A value as one would write it in TOML, shortened."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            text = value if len(value) <= 60 else value[:57] + "..."
            return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        case dict():
            return "{" + ", ".join(f"{quoted(str(key))} = {shown(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)
