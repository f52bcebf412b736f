"""A run of four steps, two of which train, and traces of training as the loop leaves them."""

from __future__ import annotations

import time
from pathlib import Path

from miles.config.schema import RunConfig
from miles.runs.checkpoints import CheckpointStore
from miles.runs.claim import Fence
from miles.runs.manifest import CheckpointInfo
from miles.runs.metrics import MetricsWriter
from miles.runs.paths import RunPaths
from miles.runs.samples import SampleRecord, write_samples
from miles.workflow.done import write_done
from miles.workflow.plan import PlannedStep, plan_run
from miles.workflow.stage import STAGES, open_stage
from tests.two_stages import STEPS

RUN = f"""
name = "demo"
runs_dir = "{{runs}}"
[checkpoint]
keep_last = 2
{STEPS}[steps.report]
kind = "report"
"""


def save(paths: RunPaths, stage: str, step: int, *, seconds: float = 0.0, **metrics: float) -> Path:
    """A small checkpoint that took `seconds` to save."""
    store = CheckpointStore(paths, stage, Fence(paths, None))
    draft = store.draft(step)
    (draft / "trainer").mkdir()
    (draft / "trainer/state").write_text(f"weights after step {step}")
    info = CheckpointInfo(stage, step, 1, time.time(), "f00", "fsdp", 1, seconds, seconds, metrics, {})
    return store.commit(draft, info, {})


def journal(paths: RunPaths, stage: str, step: int) -> None:
    directory = paths.journal(stage) / f"step-{step:06d}"
    directory.mkdir(parents=True)
    (directory / "batch-0123456789abcdef.h5").touch()


def train(paths: RunPaths, stage: str, *, saved: list[int], journaled: list[int]) -> None:
    """What a stage leaves when it ends at any instant."""
    for step in saved:
        save(paths, stage, step, loss=1.0 / step)
    for step in journaled:
        journal(paths, stage, step)
    for step in range(1, 1 + max([0, *saved, *journaled])):
        MetricsWriter(paths).write(stage, step, {"loss": 1.0 / step})
        write_samples(paths, stage, step, [SampleRecord("a", "b", None, 1.0)])


def finish(paths: RunPaths, planned: PlannedStep, *, saved: int = 4) -> None:
    """Let a step run to its end; a stage has a checkpoint of step `saved`."""
    open_stage(paths, planned)
    if planned.kind in STAGES:
        train(paths, planned.name, saved=[saved], journaled=[])
    (paths.step(planned.name) / "model").mkdir(parents=True)
    (paths.step(planned.name) / "model/weights").write_text(planned.name)
    write_done(paths, planned.name, planned.inputs, attempt=1, finished=100.0, seconds=5.0)


def finish_until(paths: RunPaths, config: RunConfig, name: str) -> PlannedStep:
    """Finish all steps before one, which is returned."""
    for planned in plan_run(config, paths):
        if planned.name == name:
            return planned
        finish(paths, planned)
    raise AssertionError(name)
