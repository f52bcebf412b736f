"""Run files on disk: `extends`, presets, `model = "DIR"`, paths relative to the file that they stand in.

Owns turning a path into one merged tree. Steps and defaults are merged in `miles.config.steps`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from miles.config.source import Node, Place, merge, parse
from miles.errors import ConfigError, did_you_mean

PRESETS = Path(__file__).parent / "presets"

SHORT_FORMS: tuple[tuple[str, ...], ...] = (("model",), ("data",), ("eval", "data"))
"""Sections for which a plain string means its `path`."""

PATH_KEYS: tuple[tuple[str, ...], ...] = (
    ("model", "path"),
    ("model", "tokenizer"),
    ("data", "path"),
    ("eval", "data", "path"),
)
"""Keys that hold a path or a `step:NAME/...` reference, in the top level and in steps."""

OWN_PATH_KEYS: tuple[tuple[str, ...], ...] = (("slurm", "template"),)
"""Keys that hold a path of the user's, never an output of a step."""


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

    def absolute(node: Node) -> Node:
        return replace(node, value=_absolute(node.value, directory)) if _is_text(node) else node

    def absolute_image(node: Node) -> Node:
        # A word alone may be the name of a container that the runtime knows.
        if not _is_text(node) or "://" in node.value or not ("/" in node.value or (directory / node.value).exists()):
            return node
        return absolute(node)

    def absolute_grader(node: Node) -> Node:
        file, colon, function = node.value.partition(":") if _is_text(node) else ("", "", "")
        if not (colon and file.endswith(".py")):
            return node
        return replace(node, value=f"{_absolute(file, directory)}:{function}")

    for scope in ((), ("steps", "*")):
        for path in SHORT_FORMS:
            root = root.edit((*scope, *path), _written_out)
        for path in (*PATH_KEYS, *OWN_PATH_KEYS):
            root = root.edit((*scope, *path), absolute)
        root = root.edit((*scope, "container", "image"), absolute_image)
        root = root.edit((*scope, "rewards", "*", "grader"), absolute_grader)
    return root


def _read(file: Path, shown: str, chain: tuple[Path, ...]) -> Node:
    identity = file.resolve()
    if identity in chain:
        circle = " -> ".join(entry.name for entry in (*chain[chain.index(identity) :], identity))
        raise ConfigError(f"{shown}: files extend each other in a circle: {circle}", fix="remove one `extends`")
    root = parse(_text(file, shown), shown)
    merged = Node({}, Place(shown), "")
    for parent, parent_shown in _parents(root, file):
        merged = merge(merged, _read(parent, parent_shown, (*chain, identity)))
    own = Node({key: child for key, child in root.table().items() if key != "extends"}, root.place, "")
    return merge(merged, expand(own, file.absolute().parent))


def _text(file: Path, shown: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
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
    parent = Path(_absolute(name, file.absolute().parent))
    if not parent.is_file():
        raise ConfigError(
            f'{place}: extends = "{name}": no such file: {parent}',
            fix="name a file relative to the one that extends it, or preset:NAME",
        )
    return parent, os.path.relpath(parent) if parent.is_relative_to(Path.cwd()) else os.fspath(parent)


def _is_text(node: Node) -> bool:
    return isinstance(node.value, str) and node.value != ""


def _written_out(node: Node) -> Node:
    return replace(node, value={"path": node}) if isinstance(node.value, str) else node


def _absolute(value: str, directory: Path) -> str:
    if value.startswith("step:"):
        return value
    return os.path.normpath(directory / Path(value).expanduser())
