"""Everything that the report of a run says, read from its directory into plain values.

Owns the reading and the wording of the header, the tables and the transcripts. Charts belong to
`miles.reports.charts`, the page to `miles.reports.html`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from miles.cluster.slurm.jobs import read_jobs
from miles.config.load import load_resolved
from miles.config.schema import EvalStep, ReportStep, RlStep, RunConfig, SftStep, TinyTaskStep
from miles.reports.charts import Chart, stage_charts
from miles.reports.timeline import Timeline, timeline_of
from miles.runs.attempts import Attempt, read_attempts
from miles.runs.claim import current_holder
from miles.runs.metrics import MetricsLine, read_metrics
from miles.runs.paths import STEP_PREFIX, RunPaths
from miles.runs.samples import SampleRecord, read_samples, sampled_steps

MAX_TRANSCRIPT_CHARACTERS = 20_000
"""Longer prompts and responses are cut in the page, saying so; the files under samples/ hold them whole."""
_PACKAGES = ("miles-hpc", "torch", "megatron-core", "transformers", "sglang")


@dataclass(frozen=True, slots=True)
class Change:
    """A metric of the evaluation at the first and the last evaluated step."""

    metric: str
    before: float
    after: float

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def is_score(self) -> bool:
        """Whether more is better; of a length nobody can tell."""
        return self.metric == "reward" or self.metric.startswith("pass@")

    @property
    def trend(self) -> str:
        """`up` or `down`, where one of them is better."""
        if not self.is_score or self.difference == 0:
            return ""
        return "up" if self.difference > 0 else "down"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the evaluations within one stage say; `first_step` equals `last_step` when there was only one."""

    first_step: int
    last_step: int
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class Transcripts:
    """Samples of one training step."""

    step: int
    samples: list[SampleRecord]


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of the workflow with metrics, or one that trains and has none yet."""

    name: str
    kind: str
    steps_done: int
    steps_planned: int | None
    """None: not a training step."""
    charts: list[Chart]
    evaluation: Evaluation | None
    transcripts: list[Transcripts]

    @property
    def complete(self) -> bool:
        return self.steps_planned is None or self.steps_done >= self.steps_planned


@dataclass(frozen=True, slots=True)
class Result:
    """results.json of an evaluation step."""

    step: str
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Content:
    """The whole report."""

    name: str
    written: float
    """Unix time, in seconds."""
    facts: list[tuple[str, str]]
    stages: list[Stage]
    results: list[Result]
    timeline: Timeline | None
    """None: nothing was started."""
    config: str
    """The resolved run file as text."""


def read_content(paths: RunPaths, *, now: float | None = None) -> Content:
    """Read a run of any state. Raises RunError when a file of the run is damaged, or is not there at all."""
    config = load_resolved(paths.root)
    lines = read_metrics(paths)
    reports = {name for name, step in config.steps.items() if isinstance(step, ReportStep)}
    attempts = [attempt for attempt in read_attempts(paths) if attempt.step not in reports]
    now = time.time() if now is None else now
    holder = current_holder(paths)
    return Content(
        name=config.name,
        written=now,
        facts=[*_run_facts(config), *_attempt_facts(attempts), *_machine_facts(attempts)],
        stages=[
            _stage(paths, name, step, lines)
            for name, step in config.steps.items()
            if isinstance(step, SftStep | RlStep) or sampled_steps(paths, name)
        ],
        results=[
            Result(name, _read_results(paths.step(name) / "results.json"))
            for name, step in config.steps.items()
            if isinstance(step, EvalStep) and (paths.step(name) / "results.json").exists()
        ],
        # Of a job only Slurm knows whether it runs, and nobody asks it here.
        timeline=timeline_of(
            attempts, read_jobs(paths), lines, running_at=now if holder is not None and holder.job is None else None
        ),
        config=paths.config.read_text(encoding="utf-8"),
    )


def evaluation_of(stage: str, lines: list[MetricsLine]) -> Evaluation | None:
    """First and last value of every `eval/*` metric of a stage; None without any."""
    evaluated = {line.step: line.values for line in lines if line.stage == stage and "eval/reward" in line.values}
    if not evaluated:
        return None
    first, last = min(evaluated), max(evaluated)
    names = [name for name in evaluated[last] if name.startswith("eval/") and name in evaluated[first]]
    changes = [Change(name.removeprefix("eval/"), evaluated[first][name], evaluated[last][name]) for name in names]
    return Evaluation(first, last, changes)


def _stage(paths: RunPaths, name: str, step: Any, lines: list[MetricsLine]) -> Stage:
    own = [line.step for line in lines if line.stage == name]
    return Stage(
        name=name,
        kind=step.kind,
        steps_done=max(own, default=0),
        steps_planned=step.train.steps if isinstance(step, SftStep | RlStep) else None,
        charts=stage_charts(name, lines),
        evaluation=evaluation_of(name, lines),
        transcripts=_transcripts(paths, name),
    )


def _transcripts(paths: RunPaths, stage: str) -> list[Transcripts]:
    """Those of the first and the last step that has any."""
    steps = sampled_steps(paths, stage)
    ends = sorted({steps[0], steps[-1]}) if steps else []
    return [Transcripts(step, read_samples(paths, stage, step)) for step in ends]


def _read_results(path: Path) -> dict[str, float]:
    """The numbers of a results.json, whatever else it holds."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _run_facts(config: RunConfig) -> list[tuple[str, str]]:
    trained = [(name, step) for name, step in config.steps.items() if isinstance(step, SftStep | RlStep)]
    facts = [("Steps of the workflow", " → ".join(f"{name} ({s.kind})" for name, s in config.steps.items()))]
    if trained:
        facts.append(("Model", _describe_model(config, trained[0][1].model.path)))
    facts += [(f"Data of {name}", _describe_data(config, step.data.path)) for name, step in trained]
    for name, step in trained:
        if isinstance(step, RlStep):
            facts.append((f"Objective of {name}", _describe_objective(step)))
    if trained:
        train = trained[-1][1].train
        facts.append(("Trainer", f"{train.backend.value}, {train.dtype.value}, {train.device}"))
    return [*facts, ("Seed", str(config.seed))]


def _describe_model(config: RunConfig, path: str) -> str:
    step = _source(config, path)
    if isinstance(step, TinyTaskStep):
        experts = f", {step.experts} experts" if "moe" in step.architecture else ""
        size = f"{step.layers} layers of width {step.hidden_size}{experts}"
        return f"{step.architecture}, {size}, built on the spot"
    return path


def _describe_data(config: RunConfig, path: str) -> str:
    step = _source(config, path)
    if isinstance(step, TinyTaskStep):
        return f"task '{step.task}', {path.rpartition('/')[2]}"
    return path


def _describe_objective(step: RlStep) -> str:
    rollout = step.rollout
    graders = " + ".join(reward.grader for reward in step.rewards)
    batch = f"{rollout.prompts_per_step} prompts x {rollout.group_size} responses"
    return f"{step.algorithm.name}, {batch} a step, graded by {graders}"


def _source(config: RunConfig, reference: str) -> Any:
    """The workflow step that a `step:NAME/...` reference names; None for a path."""
    if not reference.startswith(STEP_PREFIX):
        return None
    return config.steps.get(reference.removeprefix(STEP_PREFIX).partition("/")[0])


def _attempt_facts(attempts: list[Attempt]) -> list[tuple[str, str]]:
    if not attempts:
        return []
    # A clock that was set back makes no working time of its own.
    seconds = sum(max(0.0, attempt.ended - attempt.started) for attempt in attempts if attempt.ended is not None)
    repeated = len(attempts) - len({attempt.step for attempt in attempts})
    again = f", {repeated} of them repeated a step" if repeated else ""
    return [
        ("Started", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(attempts[0].started))),
        ("Working time", format_duration(seconds)),
        ("Attempts", f"{len(attempts)}{again}"),
    ]


def _machine_facts(attempts: list[Attempt]) -> list[tuple[str, str]]:
    """Hosts from the ledger; hardware and versions only of this machine, which may not be the run's."""
    here = socket.gethostname()
    hosts = list(dict.fromkeys(attempt.host for attempt in attempts))
    ran_here = hosts in ([], [here])
    gibibytes = psutil.virtual_memory().total / 2**30
    hardware = f"{platform.machine()}, {os.cpu_count()} CPU threads, {gibibytes:.0f} GiB of memory"
    facts = [] if ran_here else [("Hosts of the run", ", ".join(hosts))]
    facts.append(("Machine" if ran_here else "This report's machine", f"{here}: {hardware}"))
    return [*facts, ("Versions" if ran_here else "This report's versions", _versions())]


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def format_time(seconds: float) -> str:
    """A Unix time as `2026-11-23 08:30:00`, in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 5 min`."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
