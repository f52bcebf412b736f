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
from miles.runs.claim import refuse_any_held, refuse_if_held
from miles.runs.directory import check_config, create_run, run_directory, set_aside
from miles.runs.paths import RunPaths
from miles.runs.trackers import check_trackers
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.preflight import check_all_inputs
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
    file: Path,
    overrides: Sequence[str],
    *,
    fresh: bool,
    refuse_if_busy: Callable[[Sequence[RunPaths]], None] = refuse_any_held,
) -> Prepared:
    """Load a run file and create or open its run directory, as `prepare_runs` does."""
    (prepared,) = prepare_runs([load_run(file, overrides)], fresh=fresh, refuse_if_busy=refuse_if_busy)
    return prepared


def prepare_runs(
    configs: Sequence[RunConfig],
    *,
    fresh: bool,
    refuse_if_busy: Callable[[Sequence[RunPaths]], None] = refuse_any_held,
) -> list[Prepared]:
    """Create or open the directories of some runs, after everything that can be checked of all of them.

    `fresh`: set those that exist aside. `refuse_if_busy` gets the runs that exist, and raises RunError when one of them
    goes on somewhere.

    Raises ConfigError, DataError, and RunError when a run is in use, differs from its config, or cannot be written.
    """
    runs = [run_directory(config) for config in configs]
    refuse_if_busy([paths for paths in runs if paths.root.exists()])
    checked = [_check(config, paths, fresh) for config, paths in zip(configs, runs, strict=True)]
    check_all_inputs([one.inputs for one in checked])
    return [_make(one) for one in checked]


def preview_runs(configs: Sequence[RunConfig]) -> list[RunPaths]:
    """Where `prepare_runs` would create or open the runs, with its checks, without writing anything.

    Raises what `prepare_runs` raises, but for what only writing can find and for runs in use.
    """
    checked = [_check(config, run_directory(config), fresh=False) for config in configs]
    check_all_inputs([one.inputs for one in checked])
    return [one.paths for one in checked]


def prepare_resume(paths: RunPaths, overrides: Sequence[str] = ()) -> Prepared:
    """Make a run ready to go on from its directory alone; `overrides` may name keys that may change.

    Raises what `prepare_run` raises.
    """
    refuse_if_held(paths)
    checked = _check(config_with(paths, overrides), paths, fresh=False)
    check_all_inputs([checked.inputs])
    return _make(checked)


def config_with(paths: RunPaths, overrides: Sequence[str]) -> RunConfig:
    """The config of an existing run with overrides laid over it; one of a section reaches every step that has it."""
    config = load_resolved(paths.root)
    if not overrides:
        return config
    return load_run(paths.config, [inner for argument in overrides for inner in spread_override(argument, config)])


@dataclass(frozen=True, slots=True)
class _Checked:
    """A run whose directory may be made or opened."""

    config: RunConfig
    paths: RunPaths
    aside: bool = False
    """Whether a run of this name is set aside before."""
    to_do: list[PlannedStep] | None = None
    """The steps that will run; None: all, in a new directory."""
    changes: list[Change] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[RunConfig, RunPaths, Sequence[str]]:
        """What the check of inputs looks at."""
        names = self.config.steps if self.to_do is None else [planned.name for planned in self.to_do]
        return self.config, self.paths, list(names)


def _check(config: RunConfig, paths: RunPaths, fresh: bool) -> _Checked:
    """Everything that can be said against a run before its inputs are read."""
    exists = paths.root.exists()
    if fresh or not exists:
        _check_packages(config)
        return _Checked(config, paths, aside=exists)
    changes = check_config(paths, config)
    _check_packages(config)
    to_do = _to_do(config, paths)
    for planned in to_do:
        refuse_changed_inputs(paths, planned)
    return _Checked(config, paths, to_do=to_do, changes=changes)


def _make(checked: _Checked) -> Prepared:
    """The directory of a run, new or opened, with its config taken over where it differs."""
    config, paths = checked.config, checked.paths
    aside = set_aside(paths) if checked.aside else None
    create_run(config)
    to_do = _to_do(config, paths) if checked.to_do is None else checked.to_do
    return Prepared(paths, to_do, aside, checked.changes)


def _to_do(config: RunConfig, paths: RunPaths) -> list[PlannedStep]:
    return [planned for planned in plan_run(config, paths) if planned.done is None]


def _check_packages(config: RunConfig) -> None:
    """Raise ConfigError for an optional package that a step will need and that is not installed."""
    for step in config.steps.values():
        if isinstance(step, SftStep | RlStep):
            check_trackers(step.tracking)
        if isinstance(step, ReportStep):
            check_report()
