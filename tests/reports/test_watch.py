"""Following a run that changes while it is watched."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from miles.config.schema import ReportStep, RunConfig
from miles.reports import watch
from miles.reports.watch import print_summary, watch_run
from miles.runs.attempts import EndReason, begin_attempt, end_attempt
from miles.runs.claim import Claim
from miles.runs.directory import create_run
from miles.runs.metrics import MetricsWriter
from miles.runs.paths import RunPaths
from miles.workflow.done import write_done
from miles.workflow.plan import plan_run


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setattr(watch, "_REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(watch, "_PLAIN_SECONDS", 0.01)
    return create_run(_config(tmp_path))


def _config(directory: Path) -> RunConfig:
    return RunConfig(name="demo", runs_dir=str(directory), steps={"train": ReportStep(kind="report")})


def _acts(paths: RunPaths) -> list[Callable[[], object]]:
    """What happens to a run, one thing between two looks at it."""
    writer = MetricsWriter(paths)
    (planned,) = plan_run(_config(paths.root.parent), paths)
    return [
        lambda: begin_attempt(paths, "train", note="starts again"),
        lambda: writer.write("train", 0, {"eval/pass@1": 0.25}),
        lambda: [writer.write("train", step, {"reward/mean": 0.5}) for step in (1, 2)],
        lambda: writer.write("train", 3, {"reward/mean": 0.75, "eval/pass@1": 0.5}),
        lambda: write_done(paths, "train", planned.inputs, attempt=1, finished=1.0, seconds=12.0),
        lambda: end_attempt(paths, 1, EndReason.FINISHED),
    ]


def _watch(paths: RunPaths, console: Console) -> None:
    acts = iter(_acts(paths))

    def running() -> bool:
        act = next(acts, None)
        if act is not None:
            act()
        return act is not None

    with Claim.acquire(paths):
        watch_run(paths, console, running=running)


def test_plain_output_has_one_line_per_event(paths: RunPaths) -> None:
    output = io.StringIO()
    _watch(paths, Console(file=output, width=80))
    assert output.getvalue().splitlines() == [
        "step train: running (starts again)",
        "train 0: eval/pass@1 0.250",
        "train 2: reward 0.500",
        "train 3: reward 0.750  eval/pass@1 0.500",
        "step train: done after 12 s",
    ]


def test_live_view_ends_with_the_final_state(paths: RunPaths) -> None:
    output = io.StringIO()
    _watch(paths, Console(file=output, width=80, height=30, force_terminal=True, color_system=None))
    final = output.getvalue()[-1500:]
    assert "✓  train" in final
    assert "held-out pass@1 0.250 → 0.500" in final


def test_summary_names_scores_and_report(paths: RunPaths) -> None:
    _watch(paths, Console(file=io.StringIO()))
    paths.report.parent.mkdir()
    paths.report.touch()
    output = io.StringIO()
    print_summary(paths, Console(file=output, width=80))
    text = output.getvalue()
    assert "demo: 1 of 1 steps done in 12 s" in text
    assert "0.250 → 0.500" in text
    assert f"report: {paths.report}" in text
