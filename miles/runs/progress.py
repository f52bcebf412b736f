"""progress.json: what the running step is doing right now, for those who watch; never restored from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from miles.runs.files import write_atomic
from miles.runs.paths import RunPaths


@dataclass(frozen=True, slots=True)
class Progress:
    """A position in a stage and within its current phase."""

    stage: str
    """Name of the workflow step."""
    kind: str
    """Kind of the workflow step."""
    step: int
    """Training step that is being done, counted from 1; 0 before the first."""
    steps: int
    """Number of training steps."""
    phase: str
    """What is being done: `generate`, `update`, `sync`, `eval` ..."""
    done: int = 0
    """Units of the phase that are finished."""
    total: int = 0
    """Units of the phase; 0: not known."""


def write_progress(paths: RunPaths, progress: Progress) -> None:
    """Replace progress.json atomically."""
    write_atomic(paths.progress, json.dumps(dataclasses.asdict(progress)), durable=False)


def read_progress(paths: RunPaths) -> Progress | None:
    """The last written progress; None before the first."""
    try:
        return Progress(**json.loads(paths.progress.read_text()))
    except FileNotFoundError:
        return None
