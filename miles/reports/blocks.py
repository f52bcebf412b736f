"""Small charts out of block characters, for terminals. Pure: numbers in, lines of text out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"


def resample(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values: means over equal stretches; NaN where a stretch has no finite value."""
    if len(values) <= width:
        return list(values)
    edges = [round(column * len(values) / width) for column in range(width + 1)]
    return [_mean(values[start:end]) for start, end in itertools.pairwise(edges)]


def sparkline(values: Sequence[float], width: int) -> str:
    """One line of block characters between the smallest and the largest value."""
    columns = resample(values, width)
    finite = [value for value in columns if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    return "".join(
        _BLOCKS[1 + round(7 * _position(value, low, high))] if math.isfinite(value) else " " for value in columns
    )


def column_chart(values: Sequence[float], *, width: int, height: int, low: float, high: float) -> list[str]:
    """`height` lines of columns that start at `low`; values outside of [low, high] are cut off there."""
    eighths = [
        max(1, round(8 * height * _position(value, low, high))) if math.isfinite(value) else 0
        for value in resample(values, width)
    ]
    return ["".join(_BLOCKS[min(8, max(0, filled - 8 * row))] for filled in eighths) for row in reversed(range(height))]


def _position(value: float, low: float, high: float) -> float:
    """Where a value lies between the bounds, 0 to 1; the middle when they coincide."""
    if high == low:
        return 0.5
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
