"""A run file in, a `RunConfig` out: the way from TOML to steps that are complete in themselves.

Owns the order of events only; each arrow is one module: files -> overrides -> steps -> validate -> rules,
file_checks, model_checks, graph_checks -> `RunConfig`, or one error with every problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from miles.config.fields import SECTIONS, alternatives, kinds_with
from miles.config.file_checks import file_findings
from miles.config.files import read_tree
from miles.config.graph_checks import graph_problems
from miles.config.model_checks import model_findings
from miles.config.overrides import apply_override, parse_override
from miles.config.problems import InvalidConfigError, Problem
from miles.config.rules import step_findings
from miles.config.schema import RunConfig
from miles.config.source import Node, Place, dotted, parse
from miles.config.steps import complete_steps, kind_of, with_default_steps
from miles.config.validate import Checked, check_values, default_problems, structure_problems
from miles.errors import RunError


def load_run(path: str | Path, overrides: Sequence[str] = (), *, swept: Sequence[str] = ()) -> RunConfig:
    """Read, merge and check a user's run file.

    Args:
        path: the TOML file. Relative paths in it start at its own directory.
        overrides: `--set` arguments such as `train.lr=2e-6`; relative paths start at the working directory.
        swept: the same, each with one of the values of a `--sweep`.

    Raises:
        ConfigError: the file cannot be read or is not TOML.
        InvalidConfigError: everything else that is wrong with it, at once.
    """
    root = with_default_steps(read_tree(Path(path)))
    arguments, places = [*overrides, *swept], []
    for number, argument in enumerate(arguments):
        root, place = apply_override(root, argument, "--set" if number < len(overrides) else "--sweep")
        places.append(place)
    steps = complete_steps(root)
    checked = check_values(root, steps)
    problems = [
        *structure_problems(root),
        *graph_problems(root, steps),
        *checked.problems,
        *default_problems(root),
        *_combination_problems(checked, steps),
        *_shadowed_overrides(steps, arguments, places),
    ]
    if problems or checked.config is None:
        raise InvalidConfigError(os.fspath(path), problems)
    return checked.config


def dump_resolved(config: RunConfig) -> str:
    """The TOML text of a resolved run; `load_resolved` reads it back to an equal `RunConfig`."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def load_resolved(run_dir: str | Path) -> RunConfig:
    """Read `<run_dir>/run.toml`, which `dump_resolved` wrote.

    Raises:
        RunError: it is missing or not what this version of Miles writes.
        ConfigError: it is not TOML.
    """
    file = Path(run_dir) / "run.toml"
    try:
        data = parse(file.read_text(encoding="utf-8"), os.fspath(file)).plain()
    except OSError as error:
        raise RunError(
            f"{file}: {error.strerror}: not a run directory", fix="`miles runs` lists run directories"
        ) from None
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
        raise RunError(
            f"{file}: not a resolved run of this version of Miles: {what}", fix="submit the run file anew"
        ) from None


def _combination_problems(checked: Checked, steps: dict[str, Node]) -> Iterator[Problem]:
    """Values that do not fit together, unless one of them is already reported as bad by itself."""
    for name, step in checked.steps.items():
        bad = checked.bad.get(name, set())
        for finding in (*step_findings(step), *file_findings(step), *model_findings(step, checked.steps)):
            if not any(key[: len(path)] == path for key in finding.keys for path in bad):
                node = next(filter(None, map(steps[name].find, finding.keys)), steps[name])
                yield Problem(node.place, finding.message, finding.fix)


def _shadowed_overrides(steps: dict[str, Node], overrides: Sequence[str], places: Sequence[Place]) -> Iterator[Problem]:
    """Overrides of a default that no step takes, because each sets the key itself or has no such section."""
    paths = [parse_override(argument)[0] for argument in overrides]
    for number, (path, place) in enumerate(zip(paths, places, strict=True)):
        replaced = any(path[: len(later)] == later for later in paths[number + 1 :])
        taken = any(node.place == place for step in steps.values() for node in step.walk())
        if path[0] not in SECTIONS or replaced or taken:
            continue
        having = [name for name, step in steps.items() if kind_of(step) in kinds_with(path[0])]
        key = dotted(path)
        if having:
            message = f"{key} reaches no step: {', '.join(having)} set it themselves"
            fix = f"--set steps.{having[0]}.{key}=..."
        else:
            message = f"{key} reaches no step: none of {', '.join(steps)} has a section {path[0]}"
            fix = f"section {path[0]} belongs to steps of kind {alternatives(kinds_with(path[0]))}"
        yield Problem(place, message, fix)
