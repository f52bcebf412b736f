"""Creating, opening and finding run directories: a run is a directory, named under `runs_dir`.

Owns what a run directory must be before anything runs in it: complete or absent, written with the resolved
config, equal to it when it is opened again. Who may run in it belongs to `miles.runs.claim`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.errors import RunError, did_you_mean
from miles.runs.files import disk_errors, sync_directory, write_new
from miles.runs.paths import RunPaths

if TYPE_CHECKING:
    from miles.config.schema import RunConfig

MIN_FREE_BYTES = 256 * 2**20
"""A run is not started with less free space: less than one small model and its logs."""


def run_directory(config: RunConfig) -> RunPaths:
    """Where the run of this config lies, whether or not it exists."""
    return RunPaths(Path(config.runs_dir).absolute() / config.name)


def create_run(config: RunConfig, *, min_free_bytes: int = MIN_FREE_BYTES) -> RunPaths:
    """Create the run's directory, or open it when the run exists with an equal config.

    Raises RunError when the config differs (naming every field), the disk is nearly full or not writable;
    then nothing is left behind.
    """
    paths = run_directory(config)
    if not paths.root.exists():
        _create(paths, config, min_free_bytes)
    else:
        _check_free(paths.root, min_free_bytes)
        check_config(paths, config)
    return paths


def check_config(paths: RunPaths, config: RunConfig) -> None:
    """Raise RunError, field by field, when an existing run was made with another config."""
    from miles.config.load import load_resolved

    old = _flatten(load_resolved(paths.root).model_dump(mode="json"))
    new = _flatten(config.model_dump(mode="json"))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if differing:
        lines = (f"  {key}: {_show(old, key)} in the run, {_show(new, key)} now" for key in differing)
        raise RunError(
            f"run '{config.name}' exists with another config ({paths.root}):\n" + "\n".join(lines),
            fix="undo the change to continue the run, `--set name=NEW` to start another one, or `--fresh` "
            "to set the old one aside",
        )


def set_aside(paths: RunPaths) -> Path:
    """Rename a run directory to the first free `NAME.old-1`, `NAME.old-2` ...; returns the new path."""
    number = 1
    while (aside := paths.root.with_name(f"{paths.root.name}.old-{number}")).exists():
        number += 1
    with disk_errors(paths.root):
        paths.root.rename(aside)
    return aside


def find_run(run: str | None, runs_dir: Path = Path("runs")) -> RunPaths:
    """The run that a person means: a path, a name under `runs_dir`, or None for the newest one there."""
    runs = list_runs(runs_dir)
    if run is None:
        if not runs:
            raise RunError(
                f"there is no run under {runs_dir.absolute()}",
                fix="start one with `miles submit RUN.toml --local`, or name the run's directory",
            )
        return runs[0]
    for root in (Path(run), runs_dir / run):
        if (root / "run.toml").is_file():
            return RunPaths(root.absolute())
    names = [paths.root.name for paths in runs]
    raise RunError(
        f"there is no run '{run}': neither ./{run} nor {runs_dir / run} holds a run.toml." + did_you_mean(run, names),
        fix="`miles runs` lists the runs of this directory",
    )


def list_runs(runs_dir: Path = Path("runs")) -> list[RunPaths]:
    """All runs under a directory, the one with the newest activity first."""
    found = [RunPaths(path.parent.absolute()) for path in runs_dir.glob("[!.]*/run.toml")]
    return sorted(found, key=_last_activity, reverse=True)


def _last_activity(paths: RunPaths) -> float:
    files = (paths.config, paths.attempts, paths.metrics)
    return max(path.stat().st_mtime for path in files if path.exists())


def _create(paths: RunPaths, config: RunConfig, min_free_bytes: int) -> None:
    """Build the directory under a temporary name and rename it into place."""
    from miles.config.load import dump_resolved

    parent = paths.root.parent
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _check_free(parent, min_free_bytes)
        draft = RunPaths(parent / f".{config.name}.{os.getpid()}.{time.time_ns()}.tmp")
        try:
            draft.root.mkdir()
            for directory in (draft.steps, draft.samples, draft.all_logs, draft.claims):
                directory.mkdir()
            draft.secrets.mkdir(mode=0o700)
            write_new(draft.engine_token, secrets.token_urlsafe(32) + "\n", mode=0o600)
            write_new(draft.config, dump_resolved(config))
            draft.root.rename(paths.root)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # those two: another process created the run in the meantime
        finally:
            shutil.rmtree(draft.root, ignore_errors=True)
        sync_directory(parent)
    check_config(paths, config)


def _check_free(directory: Path, min_free_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < min_free_bytes:
        raise RunError(
            f"{directory} has {free / 2**20:.0f} MiB of free space; a run needs at least "
            f"{min_free_bytes / 2**20:.0f} MiB",
            fix="free some space there, or set runs_dir to a directory on another disk",
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables and lists to dotted keys."""
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _show(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(not set)"
