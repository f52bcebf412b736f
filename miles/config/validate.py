"""Single values: what pydantic finds in a merged run, said in the words of the run file.

Owns unknown keys, missing keys, wrong types and bounds. Arithmetic between values belongs to `miles.config.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from miles.config.fields import (
    SECTIONS,
    STEP_KINDS,
    TOP_LEVEL,
    Key,
    all_keys,
    bounds,
    kinds_with,
    own_keys,
    sections_of,
    type_name,
)
from miles.config.positions import KeyPath
from miles.config.problems import Problem, shown
from miles.config.schema import RunConfig
from miles.config.source import Node, dotted
from miles.config.steps import kind_of
from miles.errors import did_you_mean


def structure_problems(root: Node) -> Iterator[Problem]:
    """Top-level keys that do not exist, and steps without a known kind."""
    for key, node in root.table().items():
        if key not in TOP_LEVEL:
            yield _unknown(node, key, valid=TOP_LEVEL, here="the top level", prefix="")
    steps = root.table().get("steps")
    if steps is not None and not isinstance(steps.value, dict):
        yield Problem(
            steps.place, f"steps = {shown(steps.plain())}: a table is wanted", "write [steps.NAME] tables"
        )
        return
    for name, step in root.nearest(("steps",)).table().items():
        if kind_of(step) is None:
            yield _no_kind(name, step)


def _no_kind(name: str, step: Node) -> Problem:
    fix = "write kind = " + " or ".join(f'"{kind}"' for kind in STEP_KINDS)
    kind = step.find(("kind",))
    if kind is None:
        return Problem(step.place, f"steps.{name}: the step has no kind", fix)
    hint = did_you_mean(str(kind.value), STEP_KINDS)
    return Problem(kind.place, f"{kind.key} = {shown(kind.plain())}: no such kind of step.{hint}", fix)


def value_problems(tree: Node, steps: dict[str, Node]) -> tuple[RunConfig | None, list[Problem]]:
    """Validate the complete steps with the plain keys of the top level; the config is None when something is wrong."""
    run = {key: node for key, node in tree.table().items() if key not in SECTIONS and key in TOP_LEVEL}
    merged = Node({**run, "steps": Node(steps, tree.place, "steps")}, tree.place, "")
    try:
        return RunConfig.model_validate(merged.plain()), []
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
    missing: dict[str, list[str]] = {}
    problems = []
    for detail in details:
        path = _without_tag(detail["loc"])
        if detail["type"] == "missing" and len(path) == 3:
            missing.setdefault(str(path[2]), []).append(str(path[1]))
        else:
            problems.append(_translate(detail, path, merged))
    problems += [_missing_section(section, names, merged) for section, names in missing.items()]
    return None, problems


def unused_section_problems(root: Node, steps: dict[str, Node]) -> Iterator[Problem]:
    """Problems of top-level sections that no step of this run takes, so that they are not found only later."""
    used = {section for step in steps.values() for section in sections_of(kind_of(step) or "report")}
    for section, model in SECTIONS.items():
        node = root.table().get(section)
        if node is None or section in used:
            continue
        rows = node.value if section == "rewards" and isinstance(node.value, list) else [node]
        for row in rows:
            try:
                model.model_validate(row.plain())
            except ValidationError as error:
                for detail in error.errors(include_url=False):
                    if detail["type"] != "missing":
                        path = ("steps", "NAME", section, *detail["loc"])
                        yield _translate(detail, path, row, row.nearest(detail["loc"]))


def _without_tag(loc: KeyPath) -> KeyPath:
    """Pydantic puts the kind of a step behind its name; the file has no such level."""
    return (*loc[:2], *loc[3:]) if loc[0] == "steps" and len(loc) > 2 else loc


def _translate(detail: ErrorDetails, path: KeyPath, merged: Node, node: Node | None = None) -> Problem:
    node = node or merged.nearest(path)
    key = entry_at(path)
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_below(path, node, merged)
        case "missing":
            return _missing(path, node, key)
    given = f"{node.key} = {shown(node.plain())}"
    wanted = type_name(key.field.annotation) if key else "table"
    limit = bounds(key.field) if key else ""
    match detail["type"]:
        case (
            "greater_than"
            | "greater_than_equal"
            | "less_than"
            | "less_than_equal"
            | "too_short"
            | "finite_number"
        ):
            message = f"{given}: must be {limit or 'finite'}"
        case "enum" | "literal_error" if isinstance(node.value, str):
            message = f"{given}: must be {wanted}.{did_you_mean(node.value, _choices(wanted))}"
        case _:
            message = f"{given} is {_type_of(node.value)}: {_article(wanted)} is wanted"
    return Problem(node.place, message, _example(key, node, wanted, limit))


def _example(key: Key | None, node: Node, wanted: str, limit: str) -> str:
    if key is None or isinstance(node.value, dict) != (wanted == "table") and wanted == "table":
        return "write it as a table: [" + node.key + "]"
    if key.default is not None:
        return f"for example the default, {key.last} = {shown(key.default)}"
    if key.required and wanted == "string":
        return f'write {key.last} = "..."'
    return f"write {_article(wanted)}{' ' + limit if limit else ''}, or leave {key.last} out"


def _missing(path: KeyPath, node: Node, key: Key | None) -> Problem:
    name = str(path[-1])
    if len(path) == 1:
        return Problem(node.place, f"{name} is missing", f'write {name} = "my-run" at the top of the file')
    wanted = type_name(key.field.annotation) if key else "string"
    example = '"..."' if wanted == "string" else wanted
    return Problem(node.place, f"{node.key}: {name} is missing", f"write {name} = {example} in [{node.key}]")


def _missing_section(section: str, names: list[str], merged: Node) -> Problem:
    first = merged.nearest(("steps", names[0]))
    who = "step " + names[0] if len(names) == 1 else "steps " + ", ".join(names)
    example = {"model": 'model = "DIR"', "data": 'data = "FILE.jsonl"'}.get(section, f"a [{section}] section")
    verb = "needs" if len(names) == 1 else "need"
    return Problem(
        first.place,
        f"{section} is missing: {who} {verb} it",
        f"write {example} at the top of the file, or steps.{names[0]}.{section} for one step only",
    )


def _unknown_below(path: KeyPath, node: Node, merged: Node) -> Problem:
    parent, name = path[:-1], str(path[-1])
    if len(parent) == 2:
        kind = kind_of(merged.nearest(parent)) or "report"
        valid = (*own_keys(kind), *sections_of(kind))
        if name in SECTIONS:
            have = ", ".join(sections_of(kind)) or "none"
            return Problem(
                node.place,
                f"{node.key}: a step of kind {kind} has no section {name} (its sections: {have})",
                f"remove it, or move it to a step of kind {' or '.join(kinds_with(name))}",
            )
        return _unknown(node, name, valid=valid, here=f"a step of kind {kind}", prefix=f"steps.{parent[1]}.")
    home = _home(parent)
    valid = tuple(key.last for key in all_keys() if key.home == home)
    prefix = node.key.removesuffix(dotted((*parent[2:], name)))
    return _unknown(node, name, valid=valid, here=f"[{home}]", prefix=prefix)


def _unknown(node: Node, name: str, *, valid: tuple[str, ...], here: str, prefix: str) -> Problem:
    message = f"{node.key}: unknown key '{name}' in {here}.{did_you_mean(name, valid)}"
    homes = [key.home for key in all_keys() if key.last == name and key.home in SECTIONS]
    if homes and not did_you_mean(name, valid):
        return Problem(
            node.place,
            f"{message} It belongs in [{homes[0]}].",
            f"write {prefix}{homes[0]}.{name}, or remove it",
        )
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


def _home(parent: KeyPath) -> str:
    return ".".join(part for part in parent[2:] if isinstance(part, str))


def _choices(wanted: str) -> list[str]:
    return [choice.strip('"') for choice in wanted.split(" or ")]


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
