"""Creating, opening and finding run directories: a run is a directory, named under `runs_dir`.

Owns what a run directory must be before anything runs in it: complete or absent, written with the resolved
config, equal to it (but for keys that may change) when it is opened again. Who may run in it belongs to
`miles.runs.claim`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from miles.errors import RunError, did_you_mean
from miles.runs.files import append_json, disk_errors, sync_directory, write_atomic, write_new
from miles.runs.paths import RunPaths

if TYPE_CHECKING:
    from miles.config.changes import Change
    from miles.config.schema import RunConfig

MIN_FREE_BYTES = 256 * 2**20
"""A run is not started with less free space: less than one small model and its logs."""


def run_directory(config: RunConfig) -> RunPaths:
    """Where the run of this config lies, whether or not it exists."""
    return RunPaths(Path(config.runs_dir).absolute() / config.name)


def create_run(
    config: RunConfig, *, min_free_bytes: int = MIN_FREE_BYTES, fill: Callable[[RunPaths], None] | None = None
) -> RunPaths:
    """Create the run's directory, or open it (`open_run`) when the run exists.

    `fill` puts more into a new directory before it gets its name.

    Raises RunError when another key differs (naming every one), the disk is nearly full or not writable; then nothing
    is left behind.
    """
    paths = run_directory(config)
    if not paths.root.exists():
        _create(paths, config, min_free_bytes, fill)
    else:
        open_run(paths, config, min_free_bytes=min_free_bytes)
    return paths


def check_config(paths: RunPaths, config: RunConfig) -> list[Change]:
    """The differences between an existing run's config and another, all of which may be taken over.

    Raises RunError, field by field, when others differ.
    """
    from miles.config.changes import config_changes
    from miles.config.load import load_resolved

    changes = config_changes(load_resolved(paths.root), config)
    refused = [change for change in changes if not change.allowed]
    if refused:
        name, allowed = paths.root.name, [change for change in changes if change.allowed]
        lines = [f"run '{name}' exists with another config ({paths.root}):", *(f"  {change}" for change in refused)]
        if allowed:
            lines += ["these alone would be taken over:", *(f"  {change}" for change in allowed)]
        raise RunError(
            "\n".join(lines),
            fix=f"undo the change to continue the run, `miles fork {name} NEW --set KEY=VALUE` to go on from its state "
            "with the change, `--set name=NEW` to start another one, or `--fresh` to set the old one aside",
        )
    return changes


def open_run(paths: RunPaths, config: RunConfig, *, min_free_bytes: int = MIN_FREE_BYTES) -> None:
    """Make an existing run ready to go on with a config that is its own, but for keys that may change.

    Those are taken over: run.toml is written anew, and config-changes.jsonl gets a line for each. Raises what
    `create_run` raises.
    """
    from miles.config.load import dump_resolved

    _check_free(paths.root, min_free_bytes)
    changes = check_config(paths, config)
    now = time.time()
    # The history comes first: after a crash in between, the next start finds the same differences again.
    for change in changes:
        append_json(paths.config_changes, {"time": now, "key": change.key, "old": change.old, "new": change.new})
    if changes:
        write_atomic(paths.config, dump_resolved(config))


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


def _create(paths: RunPaths, config: RunConfig, min_free_bytes: int, fill: Callable[[RunPaths], None] | None) -> None:
    """Build the directory under a temporary name and rename it into place."""
    from miles.config.load import dump_resolved

    parent = paths.root.parent
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _check_free(parent, min_free_bytes)
        draft = RunPaths(parent / f".{config.name}.{os.getpid()}.{time.time_ns()}.tmp")
        try:
            draft.root.mkdir(mode=0o700)
            for directory in (draft.steps, draft.samples, draft.all_logs, draft.claims):
                directory.mkdir()
            draft.secrets.mkdir(mode=0o700)
            write_new(draft.engine_token, secrets.token_urlsafe(32) + "\n", mode=0o600)
            write_new(draft.config, dump_resolved(config))
            if fill is not None:
                fill(draft)
            draft.root.rename(paths.root)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # those two: another process created the run in the meantime
        finally:
            shutil.rmtree(draft.root, ignore_errors=True)
        sync_directory(parent)
    open_run(paths, config, min_free_bytes=0)


def _check_free(directory: Path, min_free_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < min_free_bytes:
        raise RunError(
            f"{directory} has {free / 2**20:.0f} MiB of free space; a run needs at least "
            f"{min_free_bytes / 2**20:.0f} MiB",
            fix="free some space there, or set runs_dir to a directory on another disk",
        )
