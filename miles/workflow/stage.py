"""How a step of a run opens: what an earlier start of it left is kept, refused or set aside.

The state of a stage (a step of kind sft or rl) is its checkpoints and its journal, and `steps/NAME/inputs.json` says
with which inputs they were made. Owns that file and the decision; the state itself belongs to `miles.runs`, and going
on from it to `miles.training`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from miles.errors import RunError
from miles.runs.files import write_atomic
from miles.runs.metrics import drop_stage
from miles.runs.paths import RunPaths
from miles.runs.rewind import rewind
from miles.runs.samples import drop_samples
from miles.workflow.fingerprint import Inputs
from miles.workflow.plan import PlannedStep

STAGES = ("sft", "rl")
"""Kinds of steps that have state between their beginning and their end."""


@dataclass(frozen=True, slots=True)
class StageState:
    """What a stage has on disk, by its directories alone: nothing is opened or verified."""

    checkpoint: int
    """Step of the newest checkpoint; 0: there is none."""
    step: int
    """Training steps that need not be generated again: those of the newest checkpoint, and of the journal after it."""

    def __str__(self) -> str:
        replayed = self.step - self.checkpoint
        steps = "1 step is" if replayed == 1 else f"{replayed} steps are"
        if not self.step:
            return "no training step"
        if not self.checkpoint:
            return f"step {self.step}, replayed from the journal"
        return f"step {self.step}" + (f": checkpoint of step {self.checkpoint}, {steps} replayed" if replayed else "")


def open_stage(paths: RunPaths, planned: PlannedStep) -> str:
    """Make a step of a claimed run ready to start; returns a note for the ledger, or an empty string.

    A stage keeps its checkpoints, journal, metrics and transcripts while its inputs are those that they were made with.
    Any other step starts from its beginning, and so does a stage that was done and has to run again with other inputs:
    what it had is moved into discarded/. Raises RunError when the inputs of an unfinished stage changed.
    """
    paths.progress.unlink(missing_ok=True)
    if planned.kind not in STAGES:
        return _start_over(paths, planned.name)
    refuse_changed_inputs(paths, planned)
    note = opening_note(paths, planned)
    if _conflict(paths, planned) and paths.inputs(planned.name).exists():
        rewind(paths, planned.name, 0)
    _remove_outputs(paths, planned.name)
    write_inputs(paths, planned.name, planned.inputs)
    return note


def opening_note(paths: RunPaths, planned: PlannedStep) -> str:
    """Where a stage goes on from when it is opened now; empty: it begins."""
    state = read_state(paths, planned.name)
    if not state.step:
        return ""
    conflict = _conflict(paths, planned)
    return f"starts over ({conflict}); its trained steps are in discarded/" if conflict else f"continues after {state}"


def refuse_changed_inputs(paths: RunPaths, planned: PlannedStep) -> None:
    """Raise RunError when a step is an unfinished stage whose state was made with other inputs."""
    if planned.kind not in STAGES or paths.done(planned.name).exists():
        return
    state, conflict = read_state(paths, planned.name), _conflict(paths, planned)
    if state.step and conflict:
        raise _changed(paths, planned.name, state, conflict)


def read_state(paths: RunPaths, name: str) -> StageState:
    """What a stage has on disk."""
    checkpoint = max(_numbers(paths.checkpoints(name), "manifest.json"), default=0)
    journaled = set(_numbers(paths.journal(name), "batch-*.h5"))
    step = checkpoint
    while step + 1 in journaled:
        step += 1
    return StageState(checkpoint, step)


def read_inputs(paths: RunPaths, name: str) -> Inputs | None:
    """The inputs that a stage's state was made with; None when it has never begun."""
    try:
        return Inputs(**json.loads(paths.inputs(name).read_text()))
    except FileNotFoundError:
        return None


def write_inputs(paths: RunPaths, name: str, inputs: Inputs) -> None:
    """Record the inputs of a stage, before it makes any state."""
    paths.step(name).mkdir(parents=True, exist_ok=True)
    write_atomic(paths.inputs(name), json.dumps(asdict(inputs), indent=2) + "\n")


def stage_fingerprint(paths: RunPaths, name: str) -> str:
    """Fingerprint of the inputs of a stage that was opened."""
    inputs = read_inputs(paths, name)
    assert inputs is not None, f"step {name} was not opened"
    return inputs.fingerprint


def _conflict(paths: RunPaths, planned: PlannedStep) -> str:
    """Why the state of a stage is of no use now, or empty."""
    old = read_inputs(paths, planned.name)
    return planned.inputs.conflict(old) if old else "its inputs are not recorded"


def _start_over(paths: RunPaths, name: str) -> str:
    """Remove what an earlier start of a step without state left behind."""
    lines = drop_stage(paths, name)
    drop_samples(paths, name)
    if paths.step(name).exists():
        shutil.rmtree(paths.step(name))
    if lines == 0:
        return ""
    return f"starts again from its beginning; {lines} metrics lines of the earlier start are removed"


def _changed(paths: RunPaths, name: str, state: StageState, conflict: str) -> RunError:
    run = paths.root.name
    steps = "1 training step" if state.step == 1 else f"{state.step} training steps"
    return RunError(
        f"step '{name}' has {steps} that were made with other inputs: {conflict}",
        fix=f"undo that, or `miles fork {run} NEW` to go on with it in another run, or "
        f"`miles resume {run} --restart {name}` to set those steps aside and begin again",
    )


def _remove_outputs(paths: RunPaths, name: str) -> None:
    """Remove the outputs of an earlier end of a stage, whole or not, and the record of it."""
    for path in paths.step(name).glob("*"):
        if path == paths.inputs(name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _numbers(directory: Path, complete: str) -> list[int]:
    """Numbers of the `step-NNNNNN` directories that hold a file of this pattern."""
    return [int(path.parent.name[5:]) for path in directory.glob(f"step-[0-9]*/{complete}")]
