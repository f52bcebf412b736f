"""The checkpoints of a run as people ask for them: a list, one on demand.

Files and their verification belong to `miles.runs.checkpoints`, saving to `miles.training.checkpointing`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from miles.config.load import load_resolved
from miles.config.schema import CheckpointSection, RlStep, RunConfig, SftStep
from miles.errors import RunError
from miles.runs.checkpoints import CheckpointStore, steps_to_keep
from miles.runs.claim import Fence
from miles.runs.files import write_atomic
from miles.runs.manifest import DamagedError, Manifest
from miles.runs.paths import RunPaths
from miles.workflow.going_back import choose_stage, stage_names
from miles.workflow.stage import STAGES
from miles.workflow.status import State, StepStatus, read_status

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint."""

    stage: str
    step: int
    directory: str
    bytes: int | None
    """None: the manifest is damaged, and so below."""
    created: float | None
    """Unix time, in seconds."""
    save_seconds: float | None
    metrics: dict[str, float]
    kept: list[str]
    """Why retention keeps it: `last`, `every N`, `best NAME`; empty where the next save removes it."""
    damage: list[str]
    """What is wrong with it, as far as was looked."""


def list_checkpoints(paths: RunPaths, config: RunConfig, *, verify: bool) -> list[Saved]:
    """All checkpoints of a run by stage and step; `verify` reads every file and compares its checksum."""
    return [saved for stage in stage_names(config) for saved in _of_stage(paths, config, stage, verify=verify)]


def newest_checkpoint(paths: RunPaths, stage: str) -> tuple[int, float] | None:
    """Step and Unix time of a stage's newest checkpoint; None without one whose manifest is intact."""
    store = _store(paths, stage)
    for step in reversed(store.steps()):
        manifest = _manifest(store, step)
        if manifest is not None:
            return step, manifest.info.created
    return None


def saved_stages(paths: RunPaths, config: RunConfig) -> list[str]:
    """The stages that have checkpoints, in the order in which they run."""
    return [name for name in stage_names(config) if _store(paths, name).steps()]


def choose_checkpoint(paths: RunPaths, config: RunConfig, stage: str | None, step: int | None) -> tuple[str, int]:
    """The checkpoint that is meant: of the named stage, else of the last that has any; without a step the newest.

    Raises RunError when there is none.
    """
    if stage is None:
        saved = saved_stages(paths, config)
        if not saved:
            raise RunError(
                f"run '{paths.root.name}' has no checkpoints",
                fix=f"`miles save {paths.root.name}` makes one while a step of kind sft or rl runs",
            )
        stage = saved[-1]
    stage = choose_stage(paths, config, stage)
    if step is None:
        step = max(_store(paths, stage).steps(), default=0)
    _store(paths, stage).require(step)
    return stage, step


def save_now(paths: RunPaths, *, timeout: float) -> Saved:
    """Ask the running stage for a checkpoint of this moment, wait for it, and return it.

    Raises RunError when nothing runs that could save, when the stage ends first, or after `timeout` seconds.
    """
    name, asked = paths.root.name, time.time()
    stage = _running_stage(paths)
    write_atomic(paths.save_request, f"{asked}\n")
    deadline = time.monotonic() + timeout
    try:
        while not (new := _begun_since(paths, stage, asked)):
            running = _running(paths)
            if running is None or running.name != stage:
                raise RunError(
                    f"step '{stage}' ended before it saved", fix=f"`miles checkpoints {name}` shows what it has"
                )
            if time.monotonic() > deadline:
                raise RunError(
                    f"step '{stage}' has not saved within {timeout:g} s: it saves between two training steps",
                    fix=f"`miles save {name} --timeout SECONDS` waits longer, `miles logs {name}` says more",
                )
            time.sleep(_POLL_SECONDS)
    finally:
        paths.save_request.unlink(missing_ok=True)
    return next(
        saved for saved in _of_stage(paths, load_resolved(paths.root), stage, verify=False) if saved.step == new
    )


def _running_stage(paths: RunPaths) -> str:
    """The stage that runs now. Raises RunError when nothing runs that has checkpoints."""
    name, running = paths.root.name, _running(paths)
    if running is None:
        raise RunError(
            f"run '{name}' is not running: there is nothing to save that is not on disk",
            fix=f"`miles checkpoints {name}` shows what it has",
        )
    if running.kind not in STAGES:
        raise RunError(
            f"step '{running.name}' is running, and a step of kind {running.kind} has no checkpoints",
            fix=f"`miles watch {name}` shows when a step of kind sft or rl begins",
        )
    return running.name


def _running(paths: RunPaths) -> StepStatus | None:
    return next((step for step in read_status(paths).steps if step.state is State.RUNNING), None)


def _begun_since(paths: RunPaths, stage: str, moment: float) -> int | None:
    """The step of a checkpoint whose saving began after a moment."""
    store = _store(paths, stage)
    for step in reversed(store.steps()):
        manifest = _manifest(store, step)
        if manifest is not None and manifest.info.created - manifest.info.save_seconds >= moment:
            return step
    return None


def _of_stage(paths: RunPaths, config: RunConfig, stage: str, *, verify: bool) -> list[Saved]:
    step_config = config.steps[stage]
    assert isinstance(step_config, SftStep | RlStep)
    store = _store(paths, stage)
    manifests = {step: _manifest(store, step) for step in store.steps()}
    reasons = _reasons(step_config.checkpoint, manifests)
    return [
        Saved(
            stage=stage,
            step=step,
            directory=str(store.path(step)),
            bytes=sum(file.size for file in manifest.files.values()) if manifest else None,
            created=manifest.info.created if manifest else None,
            save_seconds=manifest.info.save_seconds if manifest else None,
            metrics=manifest.info.metrics if manifest else {},
            kept=reasons.get(step, []),
            damage=store.damage(step, contents=verify),
        )
        for step, manifest in manifests.items()
    ]


def _reasons(section: CheckpointSection, manifests: dict[int, Manifest | None]) -> dict[int, list[str]]:
    """Which rules of the retention keep each checkpoint."""
    values = {
        step: manifest.info.metrics.get(section.keep_best) if section.keep_best else None
        for step, manifest in manifests.items()
        if manifest is not None
    }
    if not values:
        return {}
    ranked = {step: value for step, value in values.items() if value is not None and not math.isnan(value)}
    rules = {
        "last": steps_to_keep(dict.fromkeys(values), section.keep_last, 0),
        f"every {section.keep_every}": {
            step for step in values if section.keep_every and step % section.keep_every == 0
        },
        f"best {section.keep_best}": {max(ranked, key=lambda step: (ranked[step], step))} if ranked else set(),
    }
    return {step: [rule for rule, steps in rules.items() if step in steps] for step in values}


def _manifest(store: CheckpointStore, step: int) -> Manifest | None:
    try:
        return store.read(step)
    except DamagedError:
        return None


def _store(paths: RunPaths, stage: str) -> CheckpointStore:
    return CheckpointStore(paths, stage, Fence(paths, None))
