"""What people see of a run, drawn from snapshots."""

import math

import pytest
from rich.console import Console

from miles.reports.snapshot import Snapshot, evaluation_changes
from miles.reports.terminal import changes_table, duration, plain_line, run_view
from miles.runs.metrics import MetricsLine
from miles.runs.progress import Progress
from miles.workflow.status import RunStatus, State, StepStatus


def _step(name: str, kind: str, state: State, *, detail: str = "", note: str = "") -> StepStatus:
    return StepStatus(name, kind, state, 1, 0.0, 92.0, None, detail, note)


def _line(step: int, **values: float) -> MetricsLine:
    return MetricsLine("grpo", step, 0.0, {name.replace("__", "/"): value for name, value in values.items()})


def _snapshot(*, state: State = State.RUNNING, detail: str = "", phase_total: int = 32) -> Snapshot:
    steps = [
        _step("warmup", "sft", State.DONE),
        _step("grpo", "rl", state, detail=detail),
        _step("report", "report", State.PENDING),
    ]
    lines = [_line(0, **{"eval__pass@1": 0.25})]
    lines += [_line(step, reward__mean=0.1 * step, loss=math.nan, time__step=2.0) for step in range(1, 5)]
    lines += [_line(5, reward__mean=0.5, time__step=2.0, **{"eval__pass@1": 0.75})]
    progress = Progress("grpo", "rl", 6, 60, "generate", 8, phase_total) if state is State.RUNNING else None
    return Snapshot(RunStatus("demo", "/runs/demo", state, None, steps), progress, lines)


def _text(snapshot: Snapshot, width: int = 100) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(run_view(snapshot, width=width))
    return capture.get()


def test_running_step_shows_progress_curve_and_figures() -> None:
    text = _text(_snapshot())
    assert "✓  warmup  sft     1:32" in text
    assert "▶  grpo" in text
    assert "step 6/60" in text
    assert "about 1:50 left" in text, "55 steps of 2 seconds"
    assert "generate" in text
    assert "8/32" in text
    assert "reward, now 0.500" in text
    assert "held-out pass@1 0.250 → 0.750" in text
    assert "reward\u00a00.500" in text


def test_phase_of_unknown_size_has_a_name_and_no_bar() -> None:
    text = _text(_snapshot(phase_total=0))
    assert "generate" in text
    assert "8/0" not in text


def test_failed_step_shows_the_first_line_of_why() -> None:
    text = _text(_snapshot(state=State.FAILED, detail="engine 0 died\nend of the log: secret details"))
    assert "✗  grpo" in text
    assert "engine 0 died" in text
    assert "secret details" not in text
    assert "reward, now 0.500" in text, "the figures stay"


@pytest.mark.parametrize("width", [40, 60, 200])
def test_view_fits_the_terminal(width: int) -> None:
    assert max(len(line) for line in _text(_snapshot(), width).splitlines()) <= width


def test_plain_line_holds_the_figures_of_one_step() -> None:
    snapshot = _snapshot()
    line = plain_line(snapshot, snapshot.metrics[-1])
    assert line == "grpo 5/60: reward 0.500  s/step 2.00  eval/pass@1 0.750"
    before = MetricsLine("grpo", 0, 0.0, {"eval/pass@1": 0.25, "time/step": 40.0})
    assert plain_line(snapshot, before) == "grpo 0/60: eval/pass@1 0.250", "no training step took these seconds"


def test_summary_compares_scores_before_and_after() -> None:
    (change,) = evaluation_changes(_snapshot())
    assert (change.stage, change.name, change.before, change.after) == ("grpo", "pass@1", 0.25, 0.75)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(changes_table([change]))
    assert "held-out pass@1  0.250 → 0.750  +0.500" in capture.get()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (92, "1:32"), (7265, "2:01:05")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
