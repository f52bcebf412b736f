"""Taking a stage back to one of its checkpoints, and copying a checkpoint into another run.

Owns the order in which that happens: after a crash in between, the stage still continues correctly, from where it was,
where it should go, or a step between them. Nothing that was trained is deleted: it moves to `discarded/<stage>-<n>`.
Whoever calls these holds the claim on the run that is changed.
"""

from __future__ import annotations

import re
from pathlib import Path

from miles.runs.checkpoints import CheckpointStore
from miles.runs.claim import Fence
from miles.runs.files import disk_errors, sync_directory
from miles.runs.metrics import copy_stage, drop_stage
from miles.runs.paths import RunPaths
from miles.runs.samples import drop_samples

_STEP = re.compile(r"step-(\d{6,})")


def rewind(paths: RunPaths, stage: str, step: int) -> Path | None:
    """Take a stage back to its checkpoint of `step` (0: its beginning).

    Later checkpoints, journaled steps and metrics lines move to a new directory, which is returned (None: there were
    none); transcripts after `step` are removed. Raises RunError naming the nearest checkpoints when there is none of
    `step`, DamagedError when it is damaged.
    """
    if step > 0:
        _store(paths, stage).require(step)
    aside = _unused(paths, stage)
    # A stage continues from its newest checkpoint, then replays its journal without a gap. The newest go first, so that
    # what remains at any instant continues from somewhere between the two ends.
    _move_later(paths.checkpoints(stage), step, aside / "checkpoints")
    _move_later(paths.journal(stage), step, aside / "journal")
    after = step if step > 0 else -1
    drop_stage(paths, stage, after, copy=aside / "metrics.jsonl")
    drop_samples(paths, stage, after)
    return aside if aside.exists() else None


def copy_checkpoint(source: RunPaths, target: RunPaths, stage: str, step: int) -> Path:
    """Give another run a stage's checkpoint of `step`, and its metrics up to there; returns the new checkpoint.

    The stage of the other run must have no state of its own. Raises RunError as `rewind` does.
    """
    drop_stage(target, stage)
    copied = _store(target, stage).copy(_store(source, stage), step)
    copy_stage(source, target, stage, step)
    return copied


def _store(paths: RunPaths, stage: str) -> CheckpointStore:
    return CheckpointStore(paths, stage, Fence(paths, None))


def _unused(paths: RunPaths, stage: str) -> Path:
    number = 1
    while (aside := paths.discarded / f"{stage}-{number}").exists():
        number += 1
    return aside


def _move_later(directory: Path, step: int, aside: Path) -> None:
    """Move the step directories > `step` into `aside`, the newest first."""
    found = {int(match[1]): path for path in directory.glob("step-*") if (match := _STEP.fullmatch(path.name))}
    later = sorted((number for number in found if number > step), reverse=True)
    if not later:
        return
    with disk_errors(aside):
        aside.mkdir(parents=True)
        for number in later:
            found[number].rename(aside / found[number].name)
        for changed in (aside, aside.parent, aside.parents[1], aside.parents[2], directory):
            sync_directory(changed)
