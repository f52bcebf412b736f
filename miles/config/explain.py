"""`miles config explain KEY` and the reference page: what a key means, its type, bound, default and home.

Everything is read off the schema through `miles.config.fields`; no key is described twice.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from miles.config.base import Mark
from miles.config.fields import (
    RUN_KEYS,
    SECTIONS,
    STEP_KINDS,
    TOP_LEVEL,
    Key,
    all_keys,
    alternatives,
    bounds,
    kinds_with,
    section_type,
    sections_of,
    type_name,
)
from miles.config.files import preset_names
from miles.config.problems import shown
from miles.errors import ConfigError, did_you_mean

EXTENDS = (
    "Files that this one extends, first to last: paths relative to it, or `preset:NAME`. Tables merge key by "
    "key, lists and plain values are replaced, and this file has the last word. Presets: "
)


MAY_CHANGE = "↻"
"""Marks keys that may change in the reference page."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What there is to know about one key, section or kind of step."""

    key: str
    type: str
    default: str
    """As it would be written in TOML; `required`, or `not set`."""
    bounds: str
    """In words, such as `> 0`; empty where every value of the type is allowed."""
    text: str
    written_in: tuple[str, ...]
    """Where it may be written."""
    may_change: bool | None = None
    """Whether a run that exists takes a new value; None for what is no key of a step."""
    keys: tuple[str, ...] = ()
    """Keys of a section or a kind of step."""


def explain(key: str) -> Explanation:
    """Explain a key (`train.lr`, `steps.warmup.train.lr` or a bare `lr`), a section or a kind of step.

    Raises:
        ConfigError: there is no such key, or several sections have one of that name.
    """
    name = key.strip().strip("[]")
    if name.startswith("steps.") and name.count(".") > 1:
        inner = name.split(".", 2)[2]
        name = inner if inner.partition(".")[0] in SECTIONS else f"steps.NAME.{inner}"
    if name in SECTIONS:
        return _section(name)
    if name in STEP_KINDS:
        return _kind(name)
    if name in ("extends", "steps"):
        return _top_level(name)
    found = [entry for entry in all_keys() if entry.name == name] or _by_last_part(name)
    if len(found) == 1:
        return _key(found[0])
    if found:
        names = ", ".join(entry.name for entry in found)
        raise ConfigError(f"'{key}' is the name of several keys: {names}", fix=f"for example {found[0].name}")
    valid = [*TOP_LEVEL, *STEP_KINDS, *(entry.name for entry in all_keys()), *(e.last for e in all_keys())]
    raise ConfigError(
        f"'{key}' is not a key of the run file.{did_you_mean(name, valid)}",
        fix="name a section (" + ", ".join(SECTIONS) + ") to see its keys",
    )


def reference_markdown() -> str:
    """The text of docs/reference/config.md."""
    parts = [
        "# Run file reference",
        "Generated from `miles/config/schema.py`; `miles config explain KEY` prints the same. "
        "How files, defaults, steps and overrides fit together is in [Configuration](../configuration.md).",
        f"{MAY_CHANGE}: a run that exists takes a new value of the key ([resume](../resume.md)); all others hold for "
        "its life, but `train.steps` may be raised while `lr_schedule` is `constant`.",
        "## Top level",
        _table([entry for entry in all_keys() if entry.name in RUN_KEYS]),
        "`extends` (string or list of strings): " + EXTENDS + ", ".join(f"`{name}`" for name in preset_names()) + ".",
    ]
    for section in SECTIONS:
        explanation = _section(section)
        kinds = ", ".join(f"`{kind}`" for kind in kinds_with(section))
        title = "[[rewards]]" if section == "rewards" else f"[{section}]"
        entries = [entry for entry in all_keys() if entry.home == section]
        parts += [f"## `{title}`", f"{explanation.text} Steps that have it: {kinds}.", _table(entries)]
    parts += ["## Steps", "Every `[steps.NAME]` has a `kind`, and beside the sections above these keys:"]
    parts.append(_table([entry for entry in all_keys() if entry.home == "steps.NAME" and len(entry.kinds) > 1]))
    for kind in STEP_KINDS:
        entries = [entry for entry in all_keys() if entry.home == "steps.NAME" and entry.kinds == (kind,)]
        sections = ", ".join(f"`{name}`" for name in sections_of(kind)) or "none"
        parts += [f"### `{kind}`", f"{_doc(STEP_KINDS[kind])} Sections: {sections}."]
        parts += [_table(entries)] if entries else []
    return "\n\n".join(parts) + "\n"


def _key(key: Key) -> Explanation:
    if key.required:
        default = "required"
    elif key.default is None:
        default = "not set"
    else:
        default = shown(key.default)
    return Explanation(
        key=key.name,
        type=type_name(key.field.annotation),
        default=default,
        bounds=bounds(key.field),
        text=key.text,
        written_in=_written_in(key),
        may_change=Mark.MAY_CHANGE in key.field.metadata if key.kinds else None,
    )


def _written_in(key: Key) -> tuple[str, ...]:
    section, _, rest = key.name.partition(".")
    if section in SECTIONS:
        opened, closed = ("[[", "]]") if section == "rewards" else ("[", "]")
        return (
            f"{opened}{section}{closed} {rest}: default of every step of kind {alternatives(key.kinds)}",
            f"{opened}steps.NAME.{section}{closed} {rest}: for one step",
        )
    if section == "steps":
        return (f"[steps.NAME] {key.last}: steps of kind {alternatives(key.kinds)}",)
    return ("the top level of the file",)


def _section(name: str) -> Explanation:
    opened, closed = ("[[", "]]") if name == "rewards" else ("[", "]")
    written = (
        f"{opened}{name}{closed}: default of every step of kind {alternatives(kinds_with(name))}",
        f"{opened}steps.NAME.{name}{closed}: for one step",
    )
    keys = tuple(entry.name for entry in all_keys() if entry.home == name)
    kind = "list of tables" if name == "rewards" else "table"
    return Explanation(name, kind, "its keys' defaults", "", _doc(SECTIONS[name]), written, keys=keys)


def _kind(name: str) -> Explanation:
    own = [entry.name for entry in all_keys() if entry.home == "steps.NAME" and name in entry.kinds]
    written = (f'[steps.NAME] with kind = "{name}"',)
    return Explanation(name, "kind of step", "", "", _doc(STEP_KINDS[name]), written, keys=(*own, *sections_of(name)))


def _top_level(name: str) -> Explanation:
    written = ("the top level of the file",)
    if name == "extends":
        text = EXTENDS + ", ".join(preset_names()) + "."
        return Explanation(name, "string or list of strings", "not set", "", text, written)
    text = "The steps of the run by name. Without any: an rl step called train, and a report step."
    return Explanation(name, "table of tables", "not set", "", text, written, keys=tuple(STEP_KINDS))


def _by_last_part(name: str) -> list[Key]:
    return [entry for entry in all_keys() if entry.last == name and entry.home.count(".") == 0]


def _doc(model: type) -> str:
    return inspect.cleandoc(model.__doc__ or "").replace("\n", " ")


def _table(entries: list[Key]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for entry in entries:
        explanation = _key(entry)
        kind = explanation.type + (f", {explanation.bounds}" if explanation.bounds else "")
        default = explanation.default if entry.required else f"`{explanation.default}`"
        if entry.default is None and not entry.required:
            default = "not set"
        text = explanation.text.replace("\n", " ").replace("|", "\\|")
        if explanation.may_change:
            text += f" {MAY_CHANGE}"
        if inner := section_type(entry.field.annotation):
            name = next(name for name, model in SECTIONS.items() if model is inner)
            text += f" Keys as in `[{name}]`."
        rows.append(f"| `{entry.last}` | {kind} | {default} | {text} |")
    return "\n".join(rows)
