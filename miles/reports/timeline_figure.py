"""The timeline of a run -> a picture with matplotlib: the step reached over time, and below it a bar per attempt.

Owns the drawing. What it shows belongs to `miles.reports.timeline`.
"""

from __future__ import annotations

import io
from xml.sax.saxutils import escape

import matplotlib
from dateutil.tz import tzlocal
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from miles.reports.content import format_duration, format_time
from miles.reports.figures import INK, PAPER, SERIES_COLOURS, STYLE, themed
from miles.reports.timeline import Bar, Timeline

_WIDTH, _RIGHT = 11.8, 0.25
"""Inches of 72 points, the margins included: two of the other figures."""
_LONGEST_NAME = 28
"""Characters of a step's name that are shown."""
_STEPS, _LANE, _FOOT, _GAP, _HEAD, _TITLE = 1.5, 0.5, 0.55, 0.16, 0.1, 0.75
"""Inches: the curve, one lane, what is below, what is between, what is above, and what is above with a title."""
_DAY = 86400.0
_NARROWEST = 0.0015
"""Part of the axis that a bar takes at least, so that the shortest attempt is seen."""
_POINTS_PER_CHARACTER = 5.0


def draw_timeline(timeline: Timeline) -> tuple[str, bytes]:
    """An `<svg>` element that takes its colours from the page, with a tooltip for each attempt, and a PNG that is
    complete in itself."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "attempts"}):
        figure = _plot(timeline, _HEAD)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        titled = _plot(timeline, _TITLE)
        height = titled.get_figheight()
        titled.text(0.1 / _WIDTH, 1 - 0.12 / height, "Attempts", va="top", fontsize=12, fontweight="bold")
        patches = [Patch(color=SERIES_COLOURS[end.colour - 1], label=end.label) for end in timeline.endings]
        place = (_left(timeline) / _WIDTH, 1 - (_TITLE - 0.02) / height)
        titled.legend(handles=patches, loc="lower left", bbox_to_anchor=place, ncols=7, frameon=False, fontsize=9)
        titled.savefig(png, format="png", dpi=200)
    text = themed(svg.getvalue(), _WIDTH, figure.get_figheight())
    for bar in timeline.bars:
        group = f'<g id="{_identity(bar)}">'
        text = text.replace(group, f"{group}<title>{escape(_tooltip(bar))}</title>", 1)
    return text, png.getvalue()


def _left(timeline: Timeline) -> float:
    """Inches of the margin that holds the names of the lanes."""
    longest = max(len(step) for step in timeline.lanes)
    return max(0.95, 0.25 + 0.09 * min(_LONGEST_NAME, longest))


def _plot(timeline: Timeline, head: float) -> Figure:
    lanes = timeline.lanes
    upper = _STEPS + _GAP if timeline.reached else 0.0
    height = head + upper + _LANE * len(lanes) + _FOOT
    figure = Figure(figsize=(_WIDTH, height))
    left, width = _left(timeline) / _WIDTH, 1 - (_left(timeline) + _RIGHT) / _WIDTH
    axes = figure.add_axes((left, _FOOT / height, width, _LANE * len(lanes) / height))
    # A run of an instant still needs an axis with a length.
    span = max(timeline.wall, 1.0)
    axes.set_xlim((timeline.started - 0.005 * span) / _DAY, (timeline.started + 1.005 * span) / _DAY)
    _draw_lanes(axes, timeline, span)
    _date(axes)
    if timeline.reached:
        bottom = (_FOOT + _LANE * len(lanes) + _GAP) / height
        _draw_steps(figure.add_axes((left, bottom, width, _STEPS / height), sharex=axes), timeline)
    return figure


def _date(axes: Axes) -> None:
    """Matplotlib counts days since 1970; shown in the time zone of whoever writes the report."""
    locator = AutoDateLocator(tz=tzlocal(), minticks=4, maxticks=10)
    axes.xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(
        locator,
        tz=tzlocal(),
        # By what the ticks count: years, months, days, hours, minutes, seconds; and for the first of each.
        formats=["%Y", "%Y-%m", "%m-%d", "%H:%M", "%H:%M", "%S.%f"],
        zero_formats=["", "%Y", "%m-%d", "%m-%d", "%H:%M", "%H:%M"],
        offset_formats=["", "", "%Y", "%Y-%m-%d", "%Y-%m-%d", "%Y-%m-%d %H:%M"],
    )
    axes.xaxis.set_major_formatter(formatter)


def _draw_steps(axes: Axes, timeline: Timeline) -> None:
    axes.grid(axis="both")
    axes.tick_params(labelbottom=False)
    axes.xaxis.offsetText.set_visible(False)
    axes.set_ylabel("training step", fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    for stage, points in timeline.reached.items():
        own = [bar for bar in timeline.bars if bar.attempt.step == stage]
        begun, until = min(bar.attempt.started for bar in own), max(bar.until for bar in own)
        times = [begun, *(time for time, _ in points), until]
        steps = [0 if points[0][1] == 1 else points[0][1] - 1, *(step for _, step in points), points[-1][1]]
        axes.step(
            [time / _DAY for time in times], steps, where="post", color=INK, linewidth=1.6, clip_on=False, zorder=3
        )
        if len(timeline.reached) > 1:
            early = times[-2] - timeline.started < timeline.wall / 4
            axes.annotate(
                stage,
                (times[-2] / _DAY, steps[-1]),
                (4 if early else -4, 3),
                textcoords="offset points",
                ha="left" if early else "right",
                fontsize=9,
            )
    axes.set_ylim(0, None)


def _draw_lanes(axes: Axes, timeline: Timeline, span: float) -> None:
    lanes = {step: index for index, step in enumerate(timeline.lanes)}
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    names = [step if len(step) <= _LONGEST_NAME else f"{step[: _LONGEST_NAME - 3]}..." for step in lanes]
    axes.set_yticks(list(lanes.values()), names)
    for wait in timeline.waits:
        ends = (wait.started / _DAY, wait.until / _DAY)
        lane = lanes[wait.step]
        style = "-" if wait.queued else (0, (1, 3))
        axes.plot(ends, (lane, lane), color=INK, linewidth=1.2, linestyle=style, zorder=0.9)
    most = max(bar.nodes for bar in timeline.bars)
    points = (_WIDTH - _left(timeline) - _RIGHT) * 72 / (1.01 * span)
    for bar in timeline.bars:
        height = 0.3 + 0.5 * bar.nodes / most
        width = max(bar.until - bar.attempt.started, _NARROWEST * span)
        corner = (bar.attempt.started / _DAY, lanes[bar.attempt.step] - height / 2)
        colour = SERIES_COLOURS[bar.ending.colour - 1]
        shape = Rectangle(corner, width / _DAY, height, facecolor=colour, gid=_identity(bar), linewidth=0)
        axes.add_patch(shape)
        label = next((text for text in _labels(bar) if len(text) * _POINTS_PER_CHARACTER < width * points), "")
        middle = (bar.attempt.started + width / 2) / _DAY
        axes.text(middle, lanes[bar.attempt.step], label, color=PAPER, ha="center", va="center_baseline", fontsize=9)


def _labels(bar: Bar) -> list[str]:
    """What to write into a bar: the longest that fits."""
    number = str(bar.attempt.number)
    return [f"{number}: {bar.place}", number] if bar.place else [number]


def _identity(bar: Bar) -> str:
    return f"attempt-{bar.attempt.number}"


def _tooltip(bar: Bar) -> str:
    lasted = "" if bar.seconds is None else f" after {format_duration(bar.seconds)}"
    reason = bar.attempt.reason.value if bar.attempt.reason else bar.ending.label
    place = f", {bar.place}" if bar.place else ""
    start = format_time(bar.attempt.started)
    return f"attempt {bar.attempt.number} of {bar.attempt.step}{place}: {start}, {reason}{lasted}"
