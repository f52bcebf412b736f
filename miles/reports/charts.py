"""What the report plots: metrics lines -> charts, as plain values.

Owns which metrics belong on which chart, their titles, units and order. Knows nothing of files or of drawing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from miles.runs.metrics import MetricsLine


class Style(StrEnum):
    """How a series is drawn."""

    LINE = "line"
    BAND = "band"
    """A fainter line: the extreme beside a mean."""
    POINTS = "points"
    """Markers joined by a line: measured at some steps only."""
    STACKED = "stacked"
    """Area on top of the series before it."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over the training steps that report it."""

    label: str
    steps: list[int]
    values: list[float]
    """Same length as `steps`; NaN where the run measured no number."""
    style: Style = Style.LINE


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure of one stage."""

    stage: str
    key: str
    """File name of the figure, unique within the stage."""
    title: str
    unit: str
    series: list[Series]
    log_scale: bool = False
    from_zero: bool = False
    """The axis starts at 0: for quantities that cannot be negative."""
    note: str = ""
    """One line that says how to read it."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A chart before it meets data: (metric, label, style) in drawing order."""

    key: str
    title: str
    unit: str
    metrics: tuple[tuple[str, str, Style], ...]
    log_scale: bool = False
    from_zero: bool = True
    note: str = ""


def _one(key: str, title: str, unit: str, metric: str, *, from_zero: bool = True, note: str = "") -> _Plan:
    return _Plan(key, title, unit, ((metric, title.lower(), Style.LINE),), from_zero=from_zero, note=note)


_PLANS = (
    _Plan(
        "reward",
        "Reward",
        "mean",
        (("reward/mean", "training", Style.LINE), ("eval/reward", "held-out", Style.POINTS)),
        from_zero=False,
    ),
    _one("loss", "Loss", "loss", "loss", from_zero=False),
    _one("perplexity", "Perplexity", "per token", "perplexity"),
    _one("entropy", "Entropy", "nats per token", "entropy"),
    _Plan(
        "length",
        "Response length",
        "tokens",
        (("response/length_mean", "mean", Style.LINE), ("response/length_max", "longest", Style.BAND)),
    ),
    _one("truncated", "Truncated responses", "fraction", "response/truncated_fraction"),
    _one(
        "silent-groups",
        "Groups without a signal",
        "fraction",
        "groups/zero_variance_fraction",
        note="Groups whose rewards are all equal: they teach nothing.",
    ),
    _Plan(
        "mismatch",
        "Trainer against engine",
        "|Δ log p|, nats",
        (
            ("mismatch/log_prob_abs_diff_mean", "mean", Style.LINE),
            ("mismatch/log_prob_abs_diff_max", "largest", Style.BAND),
        ),
        log_scale=True,
        note="The same weights in two implementations; the floor is that of the arithmetic.",
    ),
    _Plan(
        "mismatch-kl",
        "Trainer against engine: KL",
        "k3 estimator, nats",
        (("mismatch/kl_k3", "KL", Style.LINE),),
        log_scale=True,
        from_zero=False,
    ),
    _one("kl", "KL to the reference model", "nats per token", "kl/reference", from_zero=False),
    _Plan(
        "clipping",
        "Clipping",
        "fraction of tokens",
        (
            ("ratio/clip_fraction", "ratio clipped", Style.LINE),
            ("importance/capped_fraction", "importance weight capped", Style.LINE),
        ),
    ),
    _one("grad-norm", "Gradient norm", "L2, before clipping", "grad_norm"),
    _one("lr", "Learning rate", "rate", "lr"),
)

_PHASES = ("generate", "reward", "log_probs", "update", "sync", "eval")
"""Phases in the order of a step; others follow by name."""


def stage_charts(stage: str, lines: list[MetricsLine]) -> list[Chart]:
    """The charts of one stage, in reading order; metrics that the stage never reports give no chart.

    `lines` may hold a step twice (a resumed attempt repeats it): the later line counts.
    """
    by_step = {line.step: line.values for line in lines if line.stage == stage}
    charts = [chart for plan in _PLANS if (chart := _planned(stage, plan, by_step))]
    for extra in (*_grader_values(stage, by_step), _pass_chart(stage, by_step), _grader_chart(stage, by_step)):
        if extra is not None:
            charts.insert(1, extra)
    if (phases := _phase_chart(stage, by_step)) is not None:
        charts.append(phases)
    return charts


def stages_of(lines: list[MetricsLine]) -> list[str]:
    """Names of the stages in order of first appearance."""
    return list(dict.fromkeys(line.stage for line in lines))


def _planned(stage: str, plan: _Plan, by_step: dict[int, dict[str, float]]) -> Chart | None:
    series = [_series(by_step, name, label, style) for name, label, style in plan.metrics]
    present = [one for one in series if one.steps]
    if not present or all(one.style is Style.BAND for one in present):
        return None
    log_scale = plan.log_scale and _spans_decade(present)
    from_zero = plan.from_zero and not log_scale
    return Chart(stage, plan.key, plan.title, plan.unit, present, log_scale, from_zero, plan.note)


def _spans_decade(series: list[Series]) -> bool:
    positive = [value for one in series for value in one.values if math.isfinite(value) and value > 0]
    return bool(positive) and max(positive) > 10 * min(positive)


def _pass_chart(stage: str, by_step: dict[int, dict[str, float]]) -> Chart | None:
    names = sorted(_names(by_step, "eval/pass@"), key=lambda name: int(name.rpartition("@")[2]))
    series = [_series(by_step, name, name.removeprefix("eval/"), Style.POINTS) for name in names]
    if not series:
        return None
    return Chart(stage, "pass", "Held-out pass@k", "fraction of prompts", series, from_zero=True)


def _grader_chart(stage: str, by_step: dict[int, dict[str, float]]) -> Chart | None:
    names = {name for name in _names(by_step, "reward/") if name.count("/") == 1} - {"reward/mean", "reward/std"}
    if len(names) < 2:  # a single grader's score is the reward itself
        return None
    series = [_series(by_step, name, name.removeprefix("reward/"), Style.LINE) for name in sorted(names)]
    return Chart(stage, "graders", "Reward by grader", "mean score before weighting", series)


def _grader_values(stage: str, by_step: dict[int, dict[str, float]]) -> Iterator[Chart]:
    """A chart for each further value that a grader returned: no two need have a scale in common."""
    for name in sorted((name for name in _names(by_step, "reward/") if name.count("/") > 1), reverse=True):
        grader, _, value = name.removeprefix("reward/").partition("/")
        series = [_series(by_step, name, value, Style.LINE)]
        key = "grader-" + re.sub(r"[^\w-]+", "-", f"{grader}-{value}")
        yield Chart(stage, key, f"{grader}: {value}", "mean, as the grader returned it", series)


def _phase_chart(stage: str, by_step: dict[int, dict[str, float]]) -> Chart | None:
    """Stacked seconds of every step: a phase that a step did not have counts 0, the rest is `other`."""
    steps = [step for step in sorted(by_step) if math.isfinite(by_step[step].get("time/step", math.nan))]
    if not steps:
        return None
    named = {name.removeprefix("time/") for name in _names(by_step, "time/")} - {"step"}
    order = [phase for phase in _PHASES if phase in named] + sorted(named - set(_PHASES))
    seconds = {phase: [_or_zero(by_step[step].get(f"time/{phase}")) for step in steps] for phase in order}
    rest = [
        max(0.0, by_step[step]["time/step"] - sum(values[i] for values in seconds.values()))
        for i, step in enumerate(steps)
    ]
    seconds["other" if seconds else "step"] = rest
    series = [
        Series(phase.replace("_", "-"), steps, values, Style.STACKED)
        for phase, values in seconds.items()
        if any(values)
    ]
    return Chart(stage, "time", "Time per step", "seconds", series, from_zero=True) if series else None


def _names(by_step: dict[int, dict[str, float]], prefix: str) -> set[str]:
    return {name for values in by_step.values() for name in values if name.startswith(prefix)}


def _series(by_step: dict[int, dict[str, float]], name: str, label: str, style: Style) -> Series:
    steps = [step for step in sorted(by_step) if name in by_step[step]]
    return Series(label, steps, [by_step[step][name] for step in steps], style)


def _or_zero(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0
