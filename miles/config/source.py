"""TOML text as a tree whose every value knows where it was written.

Owns reading one text and merging such trees. What the keys mean is not known here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from miles.config.positions import KeyPath, key_lines
from miles.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: a line of `source`, or (line 0) all of it, such as a `--set` argument."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Node:
    """A TOML value. Tables are `dict[str, Node]`, arrays `list[Node]`, everything else is plain."""

    value: Any
    place: Place
    key: str
    """Dotted key as it was written, for example `steps.warmup.train.lr`."""

    def table(self) -> dict[str, Node]:
        """Its children where it is a table, else none."""
        return self.value if isinstance(self.value, dict) else {}

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        if isinstance(self.value, dict | list):
            for child in self.value.values() if isinstance(self.value, dict) else self.value:
                yield from child.walk()

    def find(self, path: KeyPath) -> Node | None:
        """The node at `path`, or None."""
        node: Node = self
        for part in path:
            child = node._child(part)
            if child is None:
                return None
            node = child
        return node

    def _child(self, part: str | int) -> Node | None:
        if isinstance(self.value, list):
            return self.value[part] if isinstance(part, int) and part < len(self.value) else None
        return self.table().get(str(part))

    def without(self, path: KeyPath) -> Node:
        """The tree without the table entry at `path`."""
        head, *rest = path
        if (child := self.table().get(str(head))) is None:
            return self
        table = dict(self.value)
        if rest:
            table[head] = child.without(tuple(rest))
        else:
            del table[head]
        return Node(table, self.place, self.key)

    def edit(self, path: tuple[str, ...], change: Callable[[Node], Node]) -> Node:
        """The tree with `change` applied to what is at `path`, if anything; `*` stands for every child."""
        if not path:
            return change(self)
        head, rest = path[0], path[1:]
        value: Any = self.value
        if isinstance(value, dict):
            value = {k: child.edit(rest, change) if head in (k, "*") else child for k, child in value.items()}
        elif isinstance(value, list) and head == "*":
            value = [child.edit(rest, change) for child in value]
        return Node(value, self.place, self.key)

    def nearest(self, path: KeyPath) -> Node:
        """The node at the longest prefix of `path` that exists."""
        for length in range(len(path), 0, -1):
            if found := self.find(path[:length]):
                return found
        return self


def merge(below: Node, above: Node) -> Node:
    """`above` laid over `below`: tables merge key by key, everything else is replaced whole."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, above.place, above.key)


def put(root: Node, path: tuple[str, ...], value: Node) -> Node:
    """`root` with `value` merged in at `path`; missing tables on the way are made."""
    for depth in range(len(path) - 1, -1, -1):
        value = Node({path[depth]: value}, value.place, ".".join(path[:depth]))
    return merge(root, value)


def dotted(path: KeyPath) -> str:
    """`("rewards", 0, "grader")` as `rewards[0].grader`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{quoted(part)}" for part in path)
    return text.removeprefix(".")


def quoted(key: str) -> str:
    """A key as TOML wants it: bare where that is allowed, else in double quotes."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'


def parse(text: str, source: str) -> Node:
    """The tree of a TOML text; `source` is its name in messages.

    Raises:
        ConfigError: the text is not TOML; the message has line, column and the offending line.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_message(str(error), text, source)) from None
    return attach(data, source, key_lines(text))


def attach(value: Any, source: str, lines: dict[KeyPath, int], path: KeyPath = ()) -> Node:
    """Give every value below `value` its place; a path without a line gets the line of what contains it."""
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 0)
    if isinstance(value, dict):
        value = {key: attach(child, source, lines, (*path, key)) for key, child in value.items()}
    elif isinstance(value, list):
        value = [attach(child, source, lines, (*path, index)) for index, child in enumerate(value)]
    return Node(value, Place(source, line), dotted(path))


def _syntax_message(error: str, text: str, source: str) -> str:
    where = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", error)
    what = error[: where.start()] if where else error
    lines = text.split("\n")
    if where and where[1]:
        line, column = int(where[1]), int(where[2])
    else:
        line = len(text.rstrip().split("\n"))
        column = len(lines[line - 1]) + 1
    shown = lines[line - 1].rstrip("\r")
    pointer = re.sub(r"[^\t]", " ", shown[: column - 1]).ljust(column - 1) + "^"
    return f"{source}:{line}:{column}: not valid TOML: {what}\n    {shown}\n    {pointer}"
