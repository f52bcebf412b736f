"""`--sweep KEY=A,B,...`: one run file as several runs, one for every combination of the values.

Owns reading the arguments and naming the runs. Each is complete in itself; nothing but its name says where it is from.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miles.config.load import load_run
from miles.config.overrides import parse_override
from miles.config.schema import RunConfig
from miles.config.source import dotted
from miles.errors import ConfigError

MAX_MEMBERS = 1000
"""Runs of one sweep: as many elements as an array may have where Slurm's MaxArraySize is what it is by default."""
MAX_NAME = 200
"""Letters of a run's name. A file system takes 255 in one part of a path, and temporary names are longer."""
_EXAMPLE = "write --sweep KEY=A,B, for example seed=0,1,2"


@dataclass(frozen=True, slots=True)
class Sweep:
    """The runs of a sweep."""

    name: str
    """Name of the run file's own run, which all their names begin with."""
    members: list[RunConfig]

    @property
    def steps(self) -> list[str]:
        """Names of all steps."""
        return list(dict.fromkeys(name for config in self.members for name in config.steps))

    @property
    def directory(self) -> Path:
        """Where the scripts and the output of its job arrays lie, beside the runs."""
        return Path(self.members[0].runs_dir).absolute() / f"{self.name}.sweep"


@dataclass(frozen=True, slots=True)
class Axis:
    """One `--sweep`: a key with its values."""

    argument: str
    key: tuple[str, ...]
    values: tuple[str, ...]
    """As they were written."""

    def overrides(self) -> list[str]:
        """`--set` arguments, one for each value."""
        return [f"{dotted(self.key)}={value}" for value in self.values]

    def labels(self) -> list[str]:
        """What each value adds to a run's name."""
        return [f"-{_plain(self.key[-1])}-{_plain(value)}" for value in self.values]


def load_sweep(file: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> Sweep:
    """Read and check the run file once for each combination of the values; the last `--sweep` changes fastest.

    Raises:
        ConfigError: arguments that are no sweep, too many runs, or runs that would have one name.
        InvalidConfigError: what is wrong with the file, or with one of the values.
    """
    axes = [parse_axis(argument) for argument in sweeps]
    _refuse_twice(axes, overrides)
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_MEMBERS:
        message = f"--sweep makes {count} runs; one sweep has at most {MAX_MEMBERS}"
        raise ConfigError(message, fix="submit parts of it, one after the other")
    combinations = list(itertools.product(*(axis.overrides() for axis in axes)))
    base = load_run(file, overrides, swept=combinations[0]).name
    names = [base + "".join(labels) for labels in itertools.product(*(axis.labels() for axis in axes))]
    _refuse_names(names)
    members = [
        load_run(file, [*overrides, f"name={json.dumps(name)}"], swept=swept)
        for name, swept in zip(names, combinations, strict=True)
    ]
    return Sweep(base, members)


def parse_axis(argument: str) -> Axis:
    """`seed=0,1,2` as its key and values; commas inside brackets and quotes are part of a value.

    Raises:
        ConfigError: no key, no value, one value twice, or a key that all runs of a sweep share.
    """
    given = f"--sweep {argument}"
    if "=" not in argument:
        raise ConfigError(f"{given}: no '=' in it", fix=_EXAMPLE)
    text = argument.partition("=")[2]
    try:
        key, _ = parse_override(argument)
    except ConfigError:
        raise ConfigError(f"{given}: '{argument.partition('=')[0]}' is not a key", fix=_EXAMPLE) from None
    values = tuple(value.strip() for value in _split(text))
    if not all(map(_plain, values)):
        raise ConfigError(f"{given}: a value is missing", fix=_EXAMPLE)
    twice = [value for value, count in Counter(repr(parse_override(f"v={v}")[1]) for v in values).items() if count > 1]
    if twice:
        raise ConfigError(f"{given}: the value {twice[0]} is there twice", fix="leave one of them out")
    shared = _SHARED.get(key[0]) or (_SHARED["slurm"] if key[0] == "steps" and key[2:3] == ("slurm",) else None)
    if shared is not None:
        raise ConfigError(f"{given}: all runs of a sweep have the same {shared[0]}", fix=shared[1])
    return Axis(argument, key, values)


_SHARED = {
    "name": ("name before their values", "leave it out: each run is named after its values"),
    "runs_dir": ("runs_dir", "use --set runs_dir=..."),
    "slurm": ("[slurm], because a job array has one set of options", "use --set, and a `miles submit` for each value"),
}
"""First parts of keys that are no sweep's to change, with what is shared and what to do instead."""


def _refuse_twice(axes: Sequence[Axis], overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key that is given twice, itself or a table that holds it."""
    others = [(f"--set {argument}", parse_override(argument)[0]) for argument in overrides]
    for axis in axes:
        for argument, key in others:
            length = min(len(key), len(axis.key))
            if key[:length] == axis.key[:length]:
                message = f"--sweep {axis.argument} and {argument} give one key twice"
                raise ConfigError(message, fix="leave one of them out")
        others.append((f"--sweep {axis.argument}", axis.key))


def _refuse_names(names: Sequence[str]) -> None:
    """Raise ConfigError when runs would share a name, or have one that is too long."""
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"--sweep: {count} runs would be called '{name}'",
            fix="a name keeps only letters, digits, '.', '_' and '-' of a value: submit these runs one by one",
        )
    longest = max(names, key=len)
    if len(longest) > MAX_NAME:
        message = f"--sweep: the name '{longest[:40]}...' has {len(longest)} letters; at most {MAX_NAME} are allowed"
        raise ConfigError(message, fix="shorten the name in the run file, or the values")


def _split(text: str) -> list[str]:
    """The text at its commas, but for those inside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def _plain(text: str) -> str:
    """What a run's name keeps of a text; a minus sign in front is kept."""
    text = text.strip("\"'")
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", text).rstrip("-")
    return kept if text.startswith("-") else kept.lstrip("-")
