"""`--set a.b=value`: one override of a run file from the command line.

Owns parsing the argument and laying it over the tree. Whether anything takes the value is asked in
`miles.config.load`, after defaults and steps have been merged.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from miles.config.fields import SECTIONS
from miles.config.files import expand
from miles.config.schema import RunConfig
from miles.config.source import Node, Place, attach, dotted, merge, put, quoted
from miles.errors import ConfigError, did_you_mean


def parse_override(argument: str) -> tuple[tuple[str, ...], Any]:
    """`train.lr=2e-6` as its key and value. The value is TOML; what is not TOML is a string.

    Raises:
        ConfigError: no `=`, or a key that is not a TOML key.
    """
    key, equals, text = argument.partition("=")
    if not equals:
        raise ConfigError(f"--set {argument}: no '=' in it", fix="write --set KEY=VALUE, for example train.lr=2e-6")
    try:
        table = tomllib.loads(f"{key.strip()} = 0")
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f"--set {argument}: '{key}' is not a key", fix="write --set KEY=VALUE, for example train.lr=2e-6"
        ) from None
    path: list[str] = []
    while isinstance(table, dict):
        (part,) = table
        path.append(part)
        table = table[part]
    return tuple(path), _value(text)


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def apply_override(root: Node, argument: str, option: str = "--set") -> tuple[Node, Place]:
    """The tree with the override laid over it, and the place that marks what came from it.

    `option`: what the argument was given with.

    Raises:
        ConfigError: it names a step that does not exist, or goes through a list.
    """
    path, value = parse_override(argument)
    place = Place(f"{option} {argument}")
    if path[0] == "extends":
        raise ConfigError(f"{place}: a file extends others, not {option}", fix="write extends = ... into the file")
    steps = list(root.nearest(("steps",)).table())
    if path[0] == "steps" and len(path) > 1 and path[1] not in steps:
        raise ConfigError(
            f"{place}: no step '{path[1]}'.{did_you_mean(path[1], steps)}",
            fix="the steps are " + ", ".join(steps),
        )
    for length in range(1, len(path)):
        node = root.find(path[:length])
        if node is not None and isinstance(node.value, list):
            raise ConfigError(
                f"{place}: {dotted(path[:length])} is a list, which {option} replaces whole",
                fix=f"{option} '{dotted(path[:length])}=[...]'",
            )
    branch = put(Node({}, place, ""), path, attach(value, place.source, {}, path))
    return merge(root, expand(branch, Path.cwd())), place


def spread_override(argument: str, config: RunConfig) -> list[str]:
    """An override of a section as overrides of every step that has the section.

    In a resolved file each step has all sections itself, so that a default would reach none.
    """
    section = parse_override(argument)[0][0]
    having = [name for name, step in config.steps.items() if section in type(step).model_fields]
    return [f"steps.{quoted(name)}.{argument}" for name in having] if section in SECTIONS and having else [argument]
