"""The HTML report of a run: one file that opens from disk, without a network, in light and dark.

Owns putting content and pictures into the template and the files under `<run_dir>/report/`.
"""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from miles.errors import ConfigError
from miles.reports.charts import Chart
from miles.reports.content import MAX_TRANSCRIPT_CHARACTERS, Content, Stage, format_duration, format_time, read_content
from miles.runs.files import disk_errors, write_atomic
from miles.runs.paths import RunPaths

if TYPE_CHECKING:
    from miles.reports.figures import Picture


@dataclass(frozen=True, slots=True)
class Tile:
    """A number at the top of the page."""

    label: str
    value: str
    before: str = ""
    detail: str = ""


def check_report() -> None:
    """Raise `ConfigError` naming the pip extra when matplotlib is not installed. Imports nothing heavy."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the report needs the package 'matplotlib', which is not installed",
            fix="pip install 'miles-hpc[report]'",
        )


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report/report.html` and one PNG per figure; returns the page.

    A run in any state gives a report: what is not there yet is left out, and the page says how far it went.

    Raises:
        ConfigError: matplotlib is not installed.
        RunError: not a run directory, a damaged file in it, or a disk that refuses.
    """
    check_report()
    from miles.reports.figures import draw
    from miles.reports.timeline_figure import draw_timeline

    content = read_content(RunPaths(run_dir))
    charts = [chart for stage in content.stages for chart in stage.charts]
    pictures = {(chart.stage, chart.key): draw(chart) for chart in charts}
    several = content.timeline is not None and len(content.timeline.bars) > 1
    timeline = draw_timeline(content.timeline) if content.timeline is not None and several else None

    directory = run_dir / "report"
    with disk_errors(directory):
        directory.mkdir(exist_ok=True)
        for old in directory.glob("*.png"):
            old.unlink()
        for (stage, key), picture in pictures.items():
            (directory / f"{stage}-{key}.png").write_bytes(picture.png)
        if timeline is not None:
            (directory / "attempts.png").write_bytes(timeline[1])
    file = directory / "report.html"
    write_atomic(file, render(content, pictures, timeline[0] if timeline else ""))
    return file


def render(content: Content, pictures: dict[tuple[str, str], Picture], timeline: str) -> str:
    """The page as text. `pictures` holds those of all charts by (stage, key), `timeline` is SVG, or empty."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("miles.reports", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = format_number
    environment.filters["signed"] = _signed
    environment.filters["date"] = _date
    environment.filters["second"] = format_time
    environment.filters["duration"] = format_duration
    environment.filters["cut"] = _cut
    # Reinforcement learning first: its reward is what a reader came for.
    stages = sorted(content.stages, key=lambda stage: stage.kind != "rl")
    return environment.get_template("report.html.j2").render(
        content=content,
        stages=stages,
        evaluated=[stage for stage in stages if stage.evaluation],
        tiles=_tiles(content, stages),
        pictures=pictures,
        timeline=content.timeline,
        timeline_picture=timeline,
        hover_data=_hover_data,
    )


def format_number(value: float | None, digits: int = 4) -> str:
    """Significant digits; `n/a` for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{value:.{digits}g}"


def _signed(value: float) -> str:
    return f"+{format_number(value)}" if value > 0 else format_number(value)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _tiles(content: Content, stages: list[Stage]) -> list[Tile]:
    tiles = []
    for stage in stages:
        if stage.evaluation is None:
            continue
        evaluation = stage.evaluation
        moved = evaluation.first_step != evaluation.last_step
        detail = f"{stage.name}, step {evaluation.first_step}"
        for change in evaluation.changes:
            if change.is_score:
                label = f"Held-out {change.metric}"
                before = format_number(change.before, 3) if moved else ""
                after = f" to {evaluation.last_step}" if moved else ""
                tiles.append(Tile(label, format_number(change.after, 3), before, detail + after))
        break
    trained = [stage for stage in stages if stage.steps_planned is not None]
    tiles += [Tile(f"Steps of {s.name}", str(s.steps_done), detail=f"of {s.steps_planned}") for s in trained]
    bars = content.timeline.bars if content.timeline else []
    seconds = [bar.seconds for bar in bars if bar.seconds is not None]
    if seconds:
        number = len(bars)
        detail = f"in {number} attempt{'s' if number > 1 else ''}"
        tiles.append(Tile("Working time", format_duration(sum(seconds)), detail=detail))
    return tiles


def _hover_data(chart: Chart, picture: Picture) -> dict[str, Any]:
    """What the page's script needs to find the values under a pointer; JSON has no NaN."""
    series = [
        {
            "label": one.label,
            "steps": one.steps,
            "values": [float(f"{value:.6g}") if math.isfinite(value) else None for value in one.values],
        }
        for one in chart.series
    ]
    return {
        "box": [round(edge, 2) for edge in picture.box],
        "range": [picture.first_step, picture.last_step],
        "series": series,
    }


def _cut(text: str) -> str:
    if len(text) <= MAX_TRANSCRIPT_CHARACTERS:
        return text
    missing = len(text) - MAX_TRANSCRIPT_CHARACTERS
    return f"{text[:MAX_TRANSCRIPT_CHARACTERS]}\n[{missing} more characters are in the files under samples/]"
