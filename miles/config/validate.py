"""Single values: what pydantic finds in a merged run, said in the words of the run file.

Owns unknown keys, missing keys, wrong types and bounds; arithmetic between values belongs to
`miles.config.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from miles.config.fields import (
    RUN_KEYS,
    SECTIONS,
    STEP_KINDS,
    TOP_LEVEL,
    Key,
    all_keys,
    alternatives,
    bounds,
    form,
    kinds_with,
    own_keys,
    sections_of,
    type_name,
)
from miles.config.positions import KeyPath
from miles.config.problems import Problem, shown
from miles.config.schema import RunConfig, StepBase
from miles.config.source import Node, dotted, quoted
from miles.config.steps import kind_of
from miles.errors import did_you_mean

BOUND_ERRORS = (
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
)
_ALTERNATIVE = re.compile(r"literal\[.*\]|constrained-(int|str)|str|int|bool")
"""What pydantic puts behind the key of a value that may be one of several things."""

SECTION_EXAMPLES = {
    "model": 'model = "DIR"',
    "data": 'data = "FILE.jsonl"',
    "eval": 'eval.data = "FILE.jsonl"',
}
"""How the sections that a step cannot do without are written."""


def structure_problems(root: Node) -> Iterator[Problem]:
    """Top-level keys that do not exist, and steps without a known kind."""
    for key, node in root.table().items():
        if key not in TOP_LEVEL:
            yield _unknown(node, key, valid=TOP_LEVEL, here="the top level", prefix="")
    steps = root.table().get("steps")
    if steps is not None and not isinstance(steps.value, dict):
        yield Problem(steps.place, f"steps = {shown(steps.plain())}: a table is wanted", "write [steps.NAME] tables")
        return
    for name, step in root.nearest(("steps",)).table().items():
        if kind_of(step) is None:
            yield _no_kind(name, step)


def _no_kind(name: str, step: Node) -> Problem:
    fix = "write kind = " + alternatives(f'"{kind}"' for kind in STEP_KINDS)
    kind = step.find(("kind",))
    if kind is None:
        return Problem(step.place, f"steps.{name}: the step has no kind", fix)
    hint = did_you_mean(str(kind.value), STEP_KINDS)
    return Problem(kind.place, f"{kind.key} = {shown(kind.plain())}: no such kind of step.{hint}", fix)


@dataclass(frozen=True, slots=True)
class Checked:
    """What validation made of a merged run."""

    config: RunConfig | None
    """None where something is wrong."""
    steps: dict[str, StepBase]
    """Steps that can be looked at further; a bad value in them is replaced by its default."""
    bad: dict[str, set[KeyPath]]
    """The keys so replaced, by step."""
    problems: list[Problem]


def check_values(root: Node, steps: dict[str, Node]) -> Checked:
    """Validate the complete steps and the plain keys of the top level."""
    run = {key: node for key, node in root.table().items() if key in RUN_KEYS}
    merged = Node({**run, "steps": Node(steps, root.place, "steps")}, root.place, "")
    try:
        config = RunConfig.model_validate(merged.plain())
        return Checked(config, dict(config.steps), {}, [])
    except ValidationError as error:
        details = list(_details(error))
    missing: dict[str, list[str]] = {}
    bad: dict[str, set[KeyPath]] = {}
    problems = []
    for detail in details:
        path = _without_tag(detail["loc"])
        if path[0] == "steps":
            bad.setdefault(str(path[1]), set()).add(_up_to_list(path[2:]))
        if detail["type"] == "missing" and len(path) == 3:
            missing.setdefault(str(path[2]), []).append(str(path[1]))
        else:
            problems.append(_translate(detail, path, merged))
    problems += [_missing_section(section, names, merged) for section, names in missing.items()]
    return Checked(None, _usable(steps, bad), bad, problems)


def _usable(steps: dict[str, Node], bad: dict[str, set[KeyPath]]) -> dict[str, StepBase]:
    """The steps without their bad keys, as far as they are valid then."""
    usable = {}
    for name, step in steps.items():
        for path in bad.get(name, ()):
            step = step.without(path)
        try:
            usable[name] = STEP_KINDS[kind_of(step) or "report"].model_validate(step.plain())
        except ValidationError:
            continue  # a required key is missing or bad: reported above
    return usable


def _up_to_list(path: KeyPath) -> KeyPath:
    """The path of the whole list where it leads into one."""
    return next((path[:n] for n, part in enumerate(path) if isinstance(part, int)), path)


def default_problems(root: Node) -> Iterator[Problem]:
    """Problems of the top-level sections, also of values that no step takes because each sets its own."""
    for section, model in SECTIONS.items():
        node = root.table().get(section)
        if node is None:
            continue
        rows = node.value if section == "rewards" and isinstance(node.value, list) else [node]
        for row in rows:
            try:
                model.model_validate(row.plain())
            except ValidationError as error:
                for detail in _details(error):
                    if detail["type"] != "missing":
                        path = ("steps", "NAME", section, *detail["loc"])
                        yield _translate(detail, path, row, row.nearest(detail["loc"]))


def _details(error: ValidationError) -> Iterator[ErrorDetails]:
    """What pydantic found. A value that is none of several alternatives is told once, not once for each of them."""
    told = set()
    for detail in error.errors(include_url=False):
        loc = detail["loc"]
        if not (loc and _ALTERNATIVE.fullmatch(str(loc[-1]))):
            yield detail
        elif loc[:-1] not in told:
            told.add(loc[:-1])
            yield {**detail, "loc": loc[:-1], "type": "alternatives"}


def _without_tag(loc: KeyPath) -> KeyPath:
    """Pydantic puts the kind of a step behind its name; the file has no such level."""
    return (*loc[:2], *loc[3:]) if loc[0] == "steps" and len(loc) > 2 else loc


def _translate(detail: ErrorDetails, path: KeyPath, merged: Node, node: Node | None = None) -> Problem:
    node = node or merged.nearest(path)
    key = entry_at(path)
    if detail["type"] == "extra_forbidden":
        return _unknown_below(path, node, merged)
    if detail["type"] == "missing":
        return _missing(path, node, key)
    given = f"{node.key} = {shown(node.plain())}"
    wanted = _wanted(key, path)
    limit = bounds(key.field) if key else ""
    written = form(key.field) if key else None
    if key is not None and written is not None:
        words, example = written
        fix = f'for example {key.last} = "{example}"'
        if type(node.value) is not str and not (limit and type(node.value) is int):
            return Problem(node.place, f"{given} is {_type_of(node.value)}: {_article(wanted)} is wanted", fix)
        return Problem(node.place, f"{given}: must be {f'a whole number {limit} or ' if limit else ''}{words}", fix)
    if detail["type"] == "too_short":
        message = f"{given}: must not be empty"
    elif detail["type"] == "alternatives" and type(node.value) is int:
        message = f"{given}: must be {' or '.join([*(shown(choice) for choice in _choices(wanted)), limit])}"
    elif detail["type"] in BOUND_ERRORS:
        message = f"{given}: must be {limit or 'finite'}"
    elif detail["type"] in ("enum", "literal_error") and isinstance(node.value, str):
        message = f"{given}: must be {wanted}.{did_you_mean(node.value, _choices(wanted))}"
    else:
        message = f"{given} is {_type_of(node.value)}: {_article(wanted)} is wanted"
    return Problem(node.place, message, _example(key, node, wanted, limit))


def _wanted(key: Key | None, path: KeyPath) -> str:
    if path[-1] == "rewards":
        return "list of tables"
    if key is None:
        return "table"
    if key.last != path[-1] and get_origin(key.field.annotation) is dict:
        return type_name(get_args(key.field.annotation)[1])
    wanted = type_name(key.field.annotation)
    return wanted.removeprefix("list of ").removesuffix("s") if isinstance(path[-1], int) else wanted


def _example(key: Key | None, node: Node, wanted: str, limit: str) -> str:
    if wanted == "list of tables":
        return f"write it as [[{node.key}]], with two brackets, once for each grader"
    if key is None or wanted == "table":
        return f"write it as a table, [{node.key}]"
    if get_origin(key.field.annotation) is dict:
        return f"write {_article(wanted)}, or leave it out"
    if key.default is not None:
        return f"for example the default, {key.last} = {shown(key.default)}"
    if key.required:
        return f'write {key.last} = "..."'
    return f"write {_article(wanted)}{' ' + limit if limit else ''}, or leave {key.last} out"


def _missing(path: KeyPath, node: Node, key: Key | None) -> Problem:
    name = str(path[-1])
    if key is None or not key.home:
        return Problem(node.place, f"{name} is missing", f'write {name} = "my-run" at the top of the file')
    return Problem(node.place, f"{node.key}.{name} is missing", f'write {name} = "..." in {node.key}')


def _missing_section(section: str, names: list[str], merged: Node) -> Problem:
    who = f"step {names[0]} needs" if len(names) == 1 else f"steps {', '.join(names)} need"
    example = SECTION_EXAMPLES[section]
    return Problem(
        merged.nearest(("steps", names[0])).place,
        f"{section} is missing: {who} it",
        f"write {example} at the top of the file, or steps.{names[0]}.{example} for one step",
    )


def _unknown_below(path: KeyPath, node: Node, merged: Node) -> Problem:
    parent, name = path[:-1], str(path[-1])
    if len(parent) == 2:
        return _unknown_in_step(name, node, merged.nearest(parent))
    home = ".".join(part for part in parent[2:] if isinstance(part, str))
    valid = tuple(key.last for key in all_keys() if key.home == home)
    prefix = node.key.removesuffix(dotted((*parent[2:], name)))
    return _unknown(node, name, valid=valid, here=f"[{home}]", prefix=prefix)


def _unknown_in_step(name: str, node: Node, step: Node) -> Problem:
    kind = kind_of(step) or "report"
    sections = sections_of(kind)
    if name in SECTIONS:
        have = ", ".join(sections) or "none"
        return Problem(
            node.place,
            f"{node.key}: a step of kind {kind} has no section {name} (its sections: {have})",
            f"remove it, or move it to a step of kind {alternatives(kinds_with(name))}",
        )
    prefix = node.key.removesuffix(quoted(name))
    here = f"a step of kind {kind}"
    return _unknown(node, name, valid=(*own_keys(kind), *sections), here=here, prefix=prefix)


def _unknown(node: Node, name: str, *, valid: tuple[str, ...], here: str, prefix: str) -> Problem:
    message = f"{node.key}: unknown key '{name}' in {here}."
    if hint := did_you_mean(name, valid):
        return Problem(node.place, message + hint, "correct the spelling, or remove it")
    homes = [key.home for key in all_keys() if key.last == name and key.home in SECTIONS]
    if homes:
        belongs = " or ".join(f"[{home}]" for home in homes)
        return Problem(node.place, f"{message} It belongs in {belongs}.", f"write {prefix}{homes[0]}.{name}")
    return Problem(node.place, message, "the keys here are " + ", ".join(valid))


def entry_at(path: KeyPath) -> Key | None:
    """The documented key at a path of the merged run (`("steps", "train", "rewards", 0, "grader")`)."""
    parts = [part for part in path if isinstance(part, str)]
    if parts[:1] == ["steps"]:
        parts = parts[2:] if len(parts) > 2 and parts[2] in SECTIONS else ["steps", "NAME", *parts[2:]]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        found = next((key for key in all_keys() if key.name == name), None)
        if found:
            return found
    return None


def _choices(wanted: str) -> list[str]:
    return re.findall(r'"([^"]+)"', wanted)


def _type_of(value: Any) -> str:
    names = {
        bool: "a true/false value",
        int: "a whole number",
        float: "a number",
        str: "a string",
        dict: "a table",
        list: "a list",
    }
    return names.get(type(value), "a date")


def _article(wanted: str) -> str:
    if wanted.startswith('"') or wanted == "true or false":
        return wanted
    return f"a {wanted}"
