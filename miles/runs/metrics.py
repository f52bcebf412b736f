"""metrics.jsonl: one line per training step of every stage.

Owns the file's format. What the names mean belongs to those who write them (docs/run-directory.md lists
them).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.runs.files import append_json, disk_errors, read_json_lines, write_atomic
from miles.runs.paths import RunPaths


@dataclass(frozen=True, slots=True)
class MetricsLine:
    """Values of one training step."""

    stage: str
    step: int
    time: float
    """Unix time of writing, in seconds."""
    values: dict[str, float]


class MetricsWriter:
    """Appends to metrics.jsonl. One process writes it at a time: rank 0 of the running step."""

    def __init__(self, paths: RunPaths, clock: Callable[[], float] = time.time) -> None:
        self._path = paths.metrics
        self._clock = clock

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append one line; a value that is not finite is written as null and read back as NaN."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        append_json(self._path, {"stage": stage, "step": step, "time": self._clock(), "values": finite})


def read_metrics(paths: RunPaths) -> list[MetricsLine]:
    """All lines in the order of writing; a line that is still being written is left out."""
    return [_line(record) for record in read_json_lines(paths.metrics)]


def last_step(paths: RunPaths, stage: str) -> int | None:
    """The highest step of a stage that has a line; None when it has none."""
    return max((line.step for line in read_metrics(paths) if line.stage == stage), default=None)


def drop_stage(paths: RunPaths, stage: str, after: int = -1, *, copy: Path | None = None) -> int:
    """Remove the lines of a stage's steps > `after`; returns how many there were.

    `copy` is a file that gets them before they are removed; it is not written when there are none.
    """
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for record in read_json_lines(paths.metrics):
        late = record["stage"] == stage and record["step"] > after
        (dropped if late else kept).append(record)
    if dropped:
        if copy is not None:
            with disk_errors(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(copy, _text(dropped))
        write_atomic(paths.metrics, _text(kept))
    return len(dropped)


def copy_stage(source: RunPaths, target: RunPaths, stage: str, last: int) -> int:
    """Copy a stage's lines of steps <= `last` into another run, in place of its own; returns how many there are."""
    own = [record for record in read_json_lines(target.metrics) if record["stage"] != stage]
    copied = [r for r in read_json_lines(source.metrics) if r["stage"] == stage and r["step"] <= last]
    write_atomic(target.metrics, _text(own + copied))
    return len(copied)


def _text(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records)


def _line(record: dict[str, Any]) -> MetricsLine:
    values = {name: math.nan if value is None else value for name, value in record["values"].items()}
    return MetricsLine(record["stage"], record["step"], record["time"], values)
