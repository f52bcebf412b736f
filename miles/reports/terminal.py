"""How a run looks in a terminal: rich renderables of a snapshot. Pure: reads no file, prints nothing."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from miles.reports.blocks import column_chart, resample, sparkline
from miles.reports.snapshot import Change, Snapshot, series
from miles.runs.metrics import MetricsLine
from miles.runs.progress import Progress
from miles.workflow.status import JobStatus, RunStatus, State, StepStatus

SYMBOLS = {
    State.PENDING: ("·", "dim"),
    State.QUEUED: ("◌", "cyan"),
    State.RUNNING: ("▶", "bold cyan"),
    State.DONE: ("✓", "green"),
    State.FAILED: ("✗", "bold red"),
    State.STOPPED: ("■", "yellow"),
    State.KILLED: ("✗", "bold red"),
}

# Name in metrics.jsonl, label, format.
KEY_FIGURES = (
    ("reward/mean", "reward", ".3f"),
    ("perplexity", "perplexity", ".3f"),
    ("loss", "loss", ".4f"),
    ("response/length_mean", "length", ".1f"),
    ("entropy", "entropy", ".3f"),
    ("grad_norm", "grad norm", ".3f"),
    ("kl/reference", "KL", ".2e"),
    ("mismatch/log_prob_abs_diff_mean", "mismatch", ".1e"),
    ("lr", "lr", ".1e"),
    ("time/step", "s/step", ".2f"),
)
PLAIN_FIGURES = ("reward/mean", "perplexity", "loss", "response/length_mean", "grad_norm", "time/step")

PHASES = {"restore": "loading the checkpoint", "replay": "replaying the journal"}
"""Phases whose names say too little."""

_NO_BREAK = "\u00a0"
_CHART_HEIGHT = 6
_CHART_WIDTH = 60
_WIDEST_COLUMN = 3
_MOST_JOBS = 6


def duration(seconds: float) -> str:
    """`8 s`, `1:32`, `2:01:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def state_text(state: State) -> Text:
    """A state with its symbol, in its colour."""
    symbol, style = SYMBOLS[state]
    return Text(f"{symbol} {state.value}", style=style)


def run_view(snapshot: Snapshot, *, width: int) -> RenderableType:
    """The whole view: steps, progress, curve, key figures."""
    status = snapshot.status
    heading = Text.assemble((status.name, "bold"), "  ", state_text(status.state), "  ", (status.directory, "dim"))
    parts: list[RenderableType] = [heading, Text(), steps_table(snapshot.status.steps)]
    parts += jobs_lines(status, now=time.time())
    if snapshot.running is not None and snapshot.progress is not None:
        parts += [Text(), progress_bars(snapshot.progress, finished=snapshot.recorded_steps, left=_time_left(snapshot))]
    elif snapshot.running is not None:
        parts += [Text(), Text("starting", "dim")]
    if snapshot.saved is not None:
        age = duration(snapshot.saved.seconds)
        parts += [] if snapshot.running else [Text()]
        parts.append(Text(f"last checkpoint: step {snapshot.saved.step} of {snapshot.saved.stage}, {age} ago", "dim"))
    if snapshot.shown is not None:
        lines = snapshot.lines_of(snapshot.shown.name)
        if lines:
            parts += [Text(), *curve(lines, width=width), *_evaluation(lines), key_figures(lines)]
    return Group(*parts)


def steps_table(steps: list[StepStatus]) -> Table:
    """One row per step: state, name, kind, duration, what to know about it."""
    table = Table.grid(padding=(0, 2))
    for step in steps:
        symbol, style = SYMBOLS[step.state]
        time = duration(step.seconds) if step.seconds is not None else ""
        remark = step.note if step.state is State.RUNNING else _first_line(step.detail)
        if step.state in (State.PENDING, State.QUEUED) and step.attempts == 0:
            remark = ""
        table.add_row(Text(symbol, style), Text(step.name, style), step.kind, time, Text(remark, "dim"))
    return table


def jobs_lines(status: RunStatus, *, now: float) -> list[RenderableType]:
    """The jobs that wait or run, else the last one of the step that ended the run; nothing for a run without jobs."""
    cluster, failed = status.cluster, status.failed_step
    of_failed = [job for job in cluster.jobs if failed is not None and job.step == failed.name]
    shown = cluster.live or (of_failed or cluster.jobs)[-1:]
    if not shown:
        return []
    table = Table.grid(padding=(0, 2))
    for job in shown[:_MOST_JOBS]:
        style = "cyan" if job.live else "dim"
        state = job.state or "not known any more"
        table.add_row(Text(f"job {job.name}", style), job.step, state, job_remark(job, now=now))
    parts: list[RenderableType] = [Text(), table]
    if len(shown) > _MOST_JOBS:
        parts.append(Text(f"and {len(shown) - _MOST_JOBS} more jobs", "dim"))
    if cluster.problem:
        parts.append(Text(f"Slurm could not be asked: {_first_line(cluster.problem)}", "yellow"))
    return parts


def job_remark(job: JobStatus, *, now: float) -> str:
    """What to know about a job: why it waits and until when, or where it runs and for how long."""
    words = [f"restarted {job.restarts} x"] * (job.restarts > 0)
    if job.waiting:
        words += [job.reason] * bool(job.reason)
        if job.started is not None and job.started > now:
            words.append(f"starts in about {duration(job.started - now)}")
    elif job.live:
        words += [f"on {','.join(job.nodes)}"] * bool(job.nodes)
        words += [f"{duration(max(0.0, job.ends - now))} of its time left"] if job.ends is not None else []
    return ", ".join(words)


def progress_bars(progress: Progress, *, finished: int, left: str) -> Table:
    """Two bars: training steps of the stage, of which `finished` are done, and units of the current phase."""
    table = Table.grid(padding=(0, 2))
    table.add_row(
        f"step {progress.step}/{progress.steps}",
        ProgressBar(total=max(1, progress.steps), completed=finished, width=40),
        left,
    )
    phase = PHASES.get(progress.phase, progress.phase)
    if progress.total > 0:
        phase_bar = ProgressBar(total=progress.total, completed=progress.done, width=40)
        table.add_row(phase, phase_bar, f"{progress.done}/{progress.total}")
    else:
        table.add_row(phase, "", "")
    return table


def curve(lines: list[MetricsLine], *, width: int) -> list[Text]:
    """The reward over the training steps, or the loss where there is no reward; needs two points."""
    rewards = series(lines, "reward/mean")
    name, values = ("reward", rewards) if rewards else ("loss", series(lines, "loss"))
    if len(values) < 2:
        return []
    space = min(_CHART_WIDTH, max(10, width - 12))
    repeat = max(1, min(_WIDEST_COLUMN, space // len(values)))
    columns = [value for value in resample(values, space) for _ in range(repeat)]
    low, high = min(0.0, *columns), max(columns)
    rows = column_chart(columns, width=len(columns), height=_CHART_HEIGHT, low=low, high=high)
    labels = [f"{high:8.3f}", *[" " * 8] * (_CHART_HEIGHT - 2), f"{low:8.3f}"]
    drawn = [
        Text.assemble((label, "dim"), (" │", "dim"), (row, "green" if name == "reward" else "yellow"))
        for label, row in zip(labels, rows, strict=True)
    ]
    return [*drawn, Text(f"{'':8} └{name}, now {values[-1]:.3f}", style="dim")]


def key_figures(lines: list[MetricsLine]) -> Text:
    """The last recorded value of the figures that people look at."""
    text = Text()
    for name, label, form in KEY_FIGURES:
        values = series(lines, name)
        if values:
            text.append(f"{label}{_NO_BREAK}".replace(" ", _NO_BREAK), "dim").append(f"{values[-1]:{form}}").append(
                "   "
            )
    return text


def plain_line(snapshot: Snapshot, line: MetricsLine) -> str:
    """One training step as one line of a log; step 0 is the evaluation before the first."""
    steps = snapshot.progress.steps if snapshot.progress and snapshot.progress.stage == line.stage else None
    figures = [
        f"{label} {line.values[name]:{form}}"
        for name, label, form in KEY_FIGURES
        if name in PLAIN_FIGURES and name in line.values and line.step > 0
    ]
    figures += [f"{name} {value:.3f}" for name, value in line.values.items() if name.startswith("eval/")]
    return f"{line.stage} {line.step}{f'/{steps}' if steps else ''}: " + "  ".join(figures)


def changes_table(changes: list[Change]) -> Table:
    """Evaluation before and after."""
    table = Table.grid(padding=(0, 2))
    for change in changes:
        difference = Text(f"{change.after - change.before:+.3f}", "green" if change.improved else "yellow")
        values = f"{change.before:.3f} → {change.after:.3f}"
        table.add_row(Text(change.stage, "dim"), f"held-out {change.name}", values, difference)
    return table


def _evaluation(lines: list[MetricsLine]) -> list[Text]:
    values = series(lines, "eval/pass@1")
    if not values:
        return []
    text = Text.assemble(("held-out pass@1 ", "dim"), f"{values[0]:.3f}")
    if len(values) > 1:
        text.append(f" → {values[-1]:.3f}  ").append(sparkline(values, _CHART_WIDTH), "cyan")
    return [text]


def _time_left(snapshot: Snapshot) -> str:
    """Time left in the stage, from the steps that it has recorded."""
    progress, running = snapshot.progress, snapshot.running
    assert progress is not None and running is not None
    trained = [line for line in snapshot.lines_of(running.name) if line.step > 0]
    times = series(trained, "time/step")[-20:]
    if not times:
        return ""
    steps_left = progress.steps - snapshot.recorded_steps
    return f"about {duration(sum(times) / len(times) * steps_left)} left" if steps_left else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
