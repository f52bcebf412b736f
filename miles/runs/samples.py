"""Transcripts of a few responses per training step, for the report: samples/<stage>/step-000001.jsonl.

Owns the files' format. Which samples are kept belongs to the loop.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.runs.files import disk_errors, read_json_lines, write_atomic
from miles.runs.paths import RunPaths

_STEP_FILE = re.compile(r"step-(\d+)\.jsonl")


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One response as a person reads it."""

    prompt: str
    response: str
    label: Any
    reward: float | None
    reward_parts: dict[str, float] = field(default_factory=dict)
    """Score of each grader before weighting."""
    finish_reason: str | None = None
    """`stop`, `length` or `abort`."""
    length: int = 0
    """Tokens of the response."""


def write_samples(paths: RunPaths, stage: str, step: int, samples: list[SampleRecord]) -> Path:
    """Write the transcripts of one training step, replacing earlier ones; returns the file."""
    path = _step_file(paths, stage, step)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_record(sample), ensure_ascii=False, default=str) + "\n" for sample in samples)
    write_atomic(path, "".join(lines))
    return path


def read_samples(paths: RunPaths, stage: str, step: int) -> list[SampleRecord]:
    """The transcripts of one training step; none when none were written."""
    return [SampleRecord(**record) for record in read_json_lines(_step_file(paths, stage, step))]


def sampled_steps(paths: RunPaths, stage: str) -> list[int]:
    """The training steps of a stage with transcripts, ascending."""
    files = (_STEP_FILE.fullmatch(path.name) for path in (paths.samples / stage).glob("step-*.jsonl"))
    return sorted(int(match[1]) for match in files if match)


def drop_samples(paths: RunPaths, stage: str, after: int = -1) -> None:
    """Remove the transcripts of a stage's steps > `after`."""
    for step in sampled_steps(paths, stage):
        if step > after:
            _step_file(paths, stage, step).unlink()


def _step_file(paths: RunPaths, stage: str, step: int) -> Path:
    return paths.samples / stage / f"step-{step:06d}.jsonl"


def _record(sample: SampleRecord) -> dict[str, Any]:
    record = dataclasses.asdict(sample)
    if sample.reward is not None and not math.isfinite(sample.reward):
        record["reward"] = None
    return record
