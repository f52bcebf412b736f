"""Run files on disk: `extends`, presets, `model = "DIR"`, paths relative to the file that they stand in.

Owns turning a path into one merged tree. Steps and defaults are merged in `miles.config.steps`.
"""

from __future__ import annotations

import os
from pathlib import Path

from miles.config.source import Node, Place, merge, parse
from miles.errors import ConfigError, did_you_mean

PRESETS = Path(__file__).parent / "presets"

SHORT_FORMS = ("model", "data")
"""Sections for which a plain string means its `path`."""

PATH_KEYS = (("model", "path"), ("model", "tokenizer"), ("data", "path"), ("eval", "data", "path"))
"""Keys that hold a path or a `step:NAME/...` reference, in the top level and in steps."""


def preset_names() -> list[str]:
    """What `extends = "preset:NAME"` accepts."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_tree(file: Path) -> Node:
    """The file merged over everything that it extends, short forms written out, paths absolute.

    Raises:
        ConfigError: a file is missing, unreadable, not TOML, or extends itself.
    """
    return _read(file, os.fspath(file), ())


def expand(root: Node, directory: Path) -> Node:
    """Write out the short forms and make relative paths absolute, at the top level and in every step."""
    table = {key: child for key, child in _scope(root, directory).table().items() if key != "steps"}
    if steps := root.table().get("steps"):
        inner = {name: _scope(step, directory) for name, step in steps.table().items()}
        table["steps"] = Node(inner, steps.place, steps.key) if steps.table() else steps
    return Node(table, root.place, root.key)


def _read(file: Path, shown: str, chain: tuple[Path, ...]) -> Node:
    identity = file.resolve()
    if identity in chain:
        circle = " -> ".join(entry.name for entry in (*chain[chain.index(identity) :], identity))
        raise ConfigError(
            f"{shown}: files extend each other in a circle: {circle}", fix="remove one `extends`"
        )
    root = parse(_text(file, shown), shown)
    merged = Node({}, Place(shown), "")
    for parent, parent_shown in _parents(root, file):
        merged = merge(merged, _read(parent, parent_shown, (*chain, identity)))
    own = Node({key: child for key, child in root.table().items() if key != "extends"}, root.place, "")
    return merge(merged, expand(own, identity.parent))


def _text(file: Path, shown: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [entry.name for entry in file.parent.glob("*.toml")] if file.parent.is_dir() else []
        hint = did_you_mean(file.name, siblings)
        raise ConfigError(f"{shown}: no such file.{hint}", fix="`miles init` writes a run file") from None
    except IsADirectoryError:
        raise ConfigError(f"{shown}: is a directory", fix="name the .toml file in it") from None
    except UnicodeDecodeError as error:
        message = f"{shown}: byte {error.start} is not UTF-8; TOML files are UTF-8"
        raise ConfigError(message, fix=f"iconv -f latin1 -t utf8 {file.name}") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}", fix="check its permissions") from None


def _parents(root: Node, file: Path) -> list[tuple[Path, str]]:
    node = root.table().get("extends")
    if node is None:
        return []
    entries = node.value if isinstance(node.value, list) else [node]
    parents = []
    for entry in entries:
        if not isinstance(entry.value, str):
            raise ConfigError(
                f"{entry.place}: extends wants file names or preset names",
                fix='for example extends = "base.toml"',
            )
        parents.append(_parent(entry.value, entry.place, file))
    return parents


def _parent(name: str, place: Place, file: Path) -> tuple[Path, str]:
    if name.startswith("preset:"):
        preset = name.removeprefix("preset:")
        if preset not in preset_names():
            raise ConfigError(
                f'{place}: extends = "{name}": no such preset.{did_you_mean(preset, preset_names())}',
                fix="the presets are " + ", ".join(preset_names()),
            )
        return PRESETS / f"{preset}.toml", name
    parent = Path(_absolute(name, file.resolve().parent))
    if not parent.is_file():
        raise ConfigError(
            f'{place}: extends = "{name}": no such file: {parent}',
            fix="name a file relative to the one that extends it, or preset:NAME",
        )
    return parent, os.path.relpath(parent) if parent.is_relative_to(Path.cwd()) else os.fspath(parent)


def _scope(scope: Node, directory: Path) -> Node:
    if not isinstance(scope.value, dict):
        return scope
    table = {key: _written_out(key, child) for key, child in scope.value.items()}
    if "eval" in table and "data" in table["eval"].table():
        inner = {key: _written_out(key, child) for key, child in table["eval"].value.items()}
        table["eval"] = Node(inner, table["eval"].place, table["eval"].key)
    result = Node(table, scope.place, scope.key)
    for path in PATH_KEYS:
        result = _absolute_at(result, path, directory)
    if isinstance(table.get("rewards"), Node) and isinstance(table["rewards"].value, list):
        graders = [_absolute_at(reward, ("grader",), directory) for reward in table["rewards"].value]
        rewards = Node(graders, table["rewards"].place, table["rewards"].key)
        result = Node({**result.value, "rewards": rewards}, scope.place, scope.key)
    return result


def _written_out(key: str, node: Node) -> Node:
    if key in SHORT_FORMS and isinstance(node.value, str):
        return Node({"path": node}, node.place, node.key)
    return node


def _absolute_at(node: Node, path: tuple[str, ...], directory: Path) -> Node:
    head, *rest = path
    child = node.table().get(head)
    if child is None:
        return node
    if rest:
        changed = _absolute_at(child, tuple(rest), directory)
    elif isinstance(child.value, str) and child.value:
        changed = Node(_absolute(child.value, directory, grader=head == "grader"), child.place, child.key)
    else:
        return node
    return Node({**node.value, head: changed}, node.place, node.key)


def _absolute(value: str, directory: Path, *, grader: bool = False) -> str:
    file, colon, function = value.partition(":")
    if file == "step" and colon:
        return value
    if grader:
        return f"{_absolute(file, directory)}:{function}" if file.endswith(".py") and colon else value
    return os.path.normpath(directory / Path(value).expanduser())
