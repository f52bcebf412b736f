"""A new run that goes on from another: its done steps and one checkpoint, with a config that may differ in any key.

Owns what is taken over and what the new run begins from. Copying a checkpoint belongs to `miles.runs`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.config.changes import Change, config_changes
from miles.config.load import load_resolved
from miles.config.schema import RunConfig
from miles.errors import RunError
from miles.runs.directory import create_run, run_directory
from miles.runs.files import write_atomic
from miles.runs.metrics import copy_stage
from miles.runs.paths import RunPaths
from miles.runs.rewind import copy_checkpoint
from miles.runs.samples import drop_samples
from miles.workflow.going_back import choose_stage, steps_after, steps_before
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.prepare import config_with
from miles.workflow.saved import choose_checkpoint, saved_stages
from miles.workflow.stage import write_inputs


@dataclass(frozen=True, slots=True)
class Forked:
    """A new run."""

    paths: RunPaths
    done: list[str]
    """Steps taken over as they are."""
    stage: str | None
    """The stage that goes on from a checkpoint; None: none does."""
    step: int
    """Step of that checkpoint."""
    changes: list[Change]
    """Keys in which its config differs."""


def fork_run(source: RunPaths, name: str, overrides: Sequence[str], *, stage: str | None, step: int | None) -> Forked:
    """Create run `name` beside `source`.

    `stage` goes on from its checkpoint of `step` (0: it begins; None: the newest). Without a stage it is the last that
    has a checkpoint, if any has.

    Raises ConfigError, and RunError when there is such a run already, no such intact checkpoint, or a change reaches a
    step that the checkpoint was made from; then nothing is left behind.
    """
    config = _renamed(config_with(source, [*overrides, f"name={json.dumps(name)}"]), source)
    target = run_directory(config)
    if target.root.exists():
        raise RunError(f"there is a run '{name}' already: {target.root}", fix="give the new run another name")
    begin = _begin(source, config, stage, step)
    plan = {planned.name: planned for planned in plan_run(config, source)}
    again = set() if begin is None else {begin[0], *steps_after(config, begin[0])}
    done = [name for name, planned in plan.items() if planned.done and name not in again]
    if begin is not None and begin[1]:
        _refuse_changed_origin(config, plan, begin[0], done)

    def fill(draft: RunPaths) -> None:
        for name in done:
            shutil.copytree(source.step(name), draft.step(name))
            copy_stage(source, draft, name, sys.maxsize)
            _copy_transcripts(source, draft, name, sys.maxsize)
        if begin is not None and begin[1]:
            write_inputs(draft, begin[0], plan[begin[0]].inputs)
            copy_checkpoint(source, draft, *begin)
            _copy_transcripts(source, draft, *begin)
        write_atomic(draft.forked, json.dumps(_origin(source, begin)) + "\n")

    create_run(config, fill=fill)
    old = load_resolved(source.root)
    changes = [change for change in config_changes(old, config) if change.key not in ("name", "runs_dir")]
    kept, number = begin if begin is not None and begin[1] else (None, 0)
    return Forked(target, done, kept, number, changes)


def _renamed(config: RunConfig, source: RunPaths) -> RunConfig:
    """The config of a run that lies beside `source`, wherever this process works."""
    parent = source.root.parent
    return config if Path(config.runs_dir).absolute() == parent else config.model_copy(update={"runs_dir": str(parent)})


def _begin(source: RunPaths, config: RunConfig, stage: str | None, step: int | None) -> tuple[str, int] | None:
    """The stage that the new run trains next, and the checkpoint that it goes on from (0: none)."""

    if step == 0:
        return choose_stage(source, config, stage), 0
    if stage is None and step is None and not saved_stages(source, config):
        return None
    return choose_checkpoint(source, config, stage, step)


def _refuse_changed_origin(config: RunConfig, plan: dict[str, PlannedStep], stage: str, done: list[str]) -> None:
    """Raise RunError when a step that the stage's checkpoint was made from would not be taken over."""
    changed = next((name for name in steps_before(config, stage) if name not in done), None)
    if changed is not None:
        raise RunError(
            f"a checkpoint of '{stage}' was made from the output of '{changed}', which would run again: "
            f"{plan[changed].why}",
            fix=f"change keys of '{stage}' and later steps only (`--set steps.{stage}.KEY=VALUE`), or "
            f"`--stage {stage} --from start` to train it anew",
        )


def _copy_transcripts(source: RunPaths, draft: RunPaths, stage: str, last: int) -> None:
    if (source.samples / stage).exists():
        shutil.copytree(source.samples / stage, draft.samples / stage)
        drop_samples(draft, stage, last)


def _origin(source: RunPaths, begin: tuple[str, int] | None) -> dict[str, Any]:
    stage, step = begin if begin is not None else (None, 0)
    return {"run": source.root.name, "directory": str(source.root), "stage": stage, "step": step, "time": time.time()}
