"""Everything that can be checked and made before a run's driver starts, so that mistakes are told at once.

Owns the order of the checks and creating or opening the run directory; what is checked belongs to others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from miles.config.changes import Change
from miles.config.load import load_resolved, load_run
from miles.config.overrides import spread_override
from miles.config.schema import ReportStep, RlStep, RunConfig, SftStep
from miles.reports.html import check_report
from miles.runs.claim import refuse_if_held
from miles.runs.directory import check_config, create_run, open_run, run_directory, set_aside
from miles.runs.paths import RunPaths
from miles.runs.trackers import check_trackers
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.preflight import check_inputs
from miles.workflow.stage import refuse_changed_inputs


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run directory that is ready to be driven."""

    paths: RunPaths
    to_do: list[PlannedStep]
    """Steps that will run, in order."""
    set_aside: Path | None = None
    """Where an earlier run of the same name went."""
    changes: list[Change] = field(default_factory=list)
    """What changed in the config of a run that existed."""


def prepare_run(
    file: Path, overrides: Sequence[str], *, fresh: bool, refuse_if_busy: Callable[[RunPaths], None] = refuse_if_held
) -> Prepared:
    """Load a run file and create or open its run directory, after everything that can be checked at once.

    `refuse_if_busy` raises RunError for a run that exists and goes on somewhere.

    Raises ConfigError, DataError, and RunError when the run is in use, differs from the file, or cannot be written.
    """
    config = load_run(file, overrides)
    paths = run_directory(config)
    exists = paths.root.exists()
    if exists:
        refuse_if_busy(paths)
    if exists and not fresh:
        return _open(config, paths)
    _check_packages(config)
    check_inputs(config, paths, config.steps)
    aside = set_aside(paths) if exists else None
    create_run(config)
    return Prepared(paths, plan_run(config, paths), aside)


def preview_run(file: Path, overrides: Sequence[str]) -> tuple[RunConfig, RunPaths]:
    """What `prepare_run` would start from, with its checks, without writing anything.

    Raises what `prepare_run` raises, but for what only writing can find.
    """
    config = load_run(file, overrides)
    paths = run_directory(config)
    if paths.root.exists():
        check_config(paths, config)
    _check_packages(config)
    check_inputs(config, paths, [planned.name for planned in plan_run(config, paths) if planned.done is None])
    return config, paths


def prepare_resume(paths: RunPaths, overrides: Sequence[str] = ()) -> Prepared:
    """Make a run ready to go on from its directory alone; `overrides` may name keys that may change.

    Raises what `prepare_run` raises.
    """
    refuse_if_held(paths)
    return _open(config_with(paths, overrides), paths)


def config_with(paths: RunPaths, overrides: Sequence[str]) -> RunConfig:
    """The config of an existing run with overrides laid over it; one of a section reaches every step that has it."""
    config = load_resolved(paths.root)
    if not overrides:
        return config
    return load_run(paths.config, [inner for argument in overrides for inner in spread_override(argument, config)])


def _open(config: RunConfig, paths: RunPaths) -> Prepared:
    """An existing run, with this config taken over where it differs."""
    changes = check_config(paths, config)
    _check_packages(config)
    to_do = [planned for planned in plan_run(config, paths) if planned.done is None]
    for planned in to_do:
        refuse_changed_inputs(paths, planned)
    check_inputs(config, paths, [planned.name for planned in to_do])
    open_run(paths, config)
    return Prepared(paths, to_do, changes=changes)


def _check_packages(config: RunConfig) -> None:
    """Raise ConfigError for an optional package that a step will need and that is not installed."""
    for step in config.steps.values():
        if isinstance(step, SftStep | RlStep):
            check_trackers(step.tracking)
        if isinstance(step, ReportStep):
            check_report()
