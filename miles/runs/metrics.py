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
from typing import Any

from miles.runs.files import append_json, read_json_lines, write_atomic
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


def drop_stage(paths: RunPaths, stage: str) -> int:
    """Remove all lines of a stage that starts again from its beginning; returns how many there were."""
    records = read_json_lines(paths.metrics)
    kept = [record for record in records if record["stage"] != stage]
    if len(kept) < len(records):
        lines = (json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in kept)
        write_atomic(paths.metrics, "".join(lines))
    return len(records) - len(kept)


def _line(record: dict[str, Any]) -> MetricsLine:
    values = {name: math.nan if value is None else value for name, value in record["values"].items()}
    return MetricsLine(record["stage"], record["step"], record["time"], values)
