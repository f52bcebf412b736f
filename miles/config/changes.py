"""What may change in a run that exists: two resolved configs compared key by key. Pure.

The schema marks the keys on which no result depends (`MayChange`). Every other key holds for the life of a run, but
for one rule: a stage with a constant learning rate may be given more steps, because the steps that it has trained would
have been the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miles.config.base import Mark, Section
from miles.config.fields import section_type
from miles.config.positions import KeyPath
from miles.config.problems import shown
from miles.config.schema import RlStep, RunConfig, Schedule, SftStep, StepBase
from miles.config.source import dotted


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs."""

    key: str
    """Dotted, for example `steps.grpo.train.lr`."""
    old: Any
    """Plain value; None: not set."""
    new: Any
    allowed: bool
    """Whether a run that exists takes the new value."""

    def __str__(self) -> str:
        old, new = ("(not set)" if value is None else shown(value) for value in (self.old, self.new))
        return f"{self.key}: {old} in the run, {new} now"


def config_changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """Every key in which two resolved configs differ, sorted by key."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    differing = (path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return sorted(
        (Change(dotted(path), before.get(path), after.get(path), _allowed(path, old, new)) for path in differing),
        key=lambda change: change.key,
    )


def lasting_values(step: StepBase) -> dict[str, Any]:
    """The values of a step that its results depend on: all but those that may change."""
    values = _lasting(step)
    if raisable_steps(step) is not None:
        del values["train"]["steps"]
    return values


def raisable_steps(step: StepBase) -> int | None:
    """`train.steps` where it may be raised later; None where the steps already trained depend on it, or without any."""
    if isinstance(step, SftStep | RlStep) and step.train.lr_schedule is Schedule.CONSTANT:
        return step.train.steps
    return None


def _allowed(path: KeyPath, old: RunConfig, new: RunConfig) -> bool:
    if path[0] != "steps" or not (path[1] in old.steps and path[1] in new.steps):
        return False
    before, after = old.steps[str(path[1])], new.steps[str(path[1])]
    if path[2:] == ("train", "steps"):
        fewer, more = raisable_steps(before), raisable_steps(after)
        return fewer is not None and more is not None and more > fewer
    return type(before) is type(after) and _marked(type(before), path[2:])


def _marked(section: type[Section], path: KeyPath) -> bool:
    """Whether the field at a path, or the list or table that it lies in, may change."""
    names = tuple(part for part in path if isinstance(part, str))
    field = section.model_fields[names[0]]
    inner = section_type(field.annotation)
    return Mark.MAY_CHANGE in field.metadata or (inner is not None and len(names) > 1 and _marked(inner, names[1:]))


def _lasting(value: Any) -> Any:
    if isinstance(value, Section):
        fields = type(value).model_fields
        plain = value.model_dump(mode="json")
        return {
            name: _lasting(inner) if _has_sections(inner := getattr(value, name)) else plain[name]
            for name, field in fields.items()
            if Mark.MAY_CHANGE not in field.metadata
        }
    return [_lasting(entry) for entry in value]


def _has_sections(value: Any) -> bool:
    return isinstance(value, Section) or (isinstance(value, list) and any(map(_has_sections, value)))


def _flatten(value: Any, path: KeyPath = ()) -> dict[KeyPath, Any]:
    """Nested tables and lists by path. A list of plain values is one value."""
    if isinstance(value, dict):
        items: list[tuple[str | int, Any]] = list(value.items())
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        items = list(enumerate(value))
    else:
        return {path: value}
    return {inner: plain for key, entry in items for inner, plain in _flatten(entry, (*path, key)).items()}
