"""Charts -> pictures with matplotlib: SVG that takes its colours from the page, and PNG.

Owns the drawing. What is on a chart belongs to `miles.reports.charts`. No pyplot: nothing global is touched.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from miles.reports.charts import Chart, Series, Style

SERIES_COLOURS = ("#2463eb", "#d9680a", "#0d8f7c", "#8a4fe0", "#c9347f", "#7a8594", "#a88600", "#3f7d20")
"""Distinct to colour-blind eyes in this order; the page has a lighter set for dark screens, by position."""
INK, GRID, PAPER = "#1b2430", "#dde2e9", "#ffffff"

_WIDTH, _HEIGHT = 5.9, 3.0
"""Inches of 72 points: the width of a card on a desktop, so that its text is drawn nearly at size."""
_BOX, _BOX_TITLED = (0.115, 0.165, 0.865, 0.77), (0.13, 0.165, 0.85, 0.64)
"""Plotting area as fractions of the figure: left, bottom, width, height. Fixed: fitting it to the labels takes
ten times as long as the drawing."""
_MARKER_LIMIT = 25
"""Up to that many points each gets a marker."""
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "svg.fonttype": "none",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart in both forms, with what a page needs to find values under a pointer."""

    svg: str
    """`<svg>` element without title and legend; colours are CSS variables `--ink`, `--grid`, `--series-1` ..."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom of the plotting area in the SVG's own units."""
    first_step: float
    """Value at the left edge of the box."""
    last_step: float
    """Value at the right edge."""
    png: bytes
    """The same, complete in itself: with title, unit and legend, on white, 200 dpi."""


def draw(chart: Chart) -> Picture:
    """Draw a chart once, save it twice."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{chart.stage}/{chart.key}"}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        axes = figure.add_axes(_BOX)
        _plot(axes, chart)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        first_step, last_step = axes.get_xlim()

        axes.set_position(_BOX_TITLED)
        axes.set_title(f"{chart.title} ({chart.stage})", loc="left", fontsize=12, fontweight="bold", pad=24)
        axes.set_ylabel(chart.unit)
        if len(chart.series) > 1:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=len(chart.series),
                frameon=False,
                fontsize=9,
                borderpad=0.2,
                handlelength=1.2,
                columnspacing=1.2,
            )
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=200)
    left, bottom, width, height = _BOX
    right, top = left + width, bottom + height
    box = (left * _WIDTH * 72, (1 - top) * _HEIGHT * 72, right * _WIDTH * 72, (1 - bottom) * _HEIGHT * 72)
    return Picture(themed(svg.getvalue(), _WIDTH, _HEIGHT), box, first_step, last_step, png.getvalue())


def _plot(axes: Axes, chart: Chart) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    baseline: list[float] | None = None
    for series, colour in zip(chart.series, _colours(chart), strict=True):
        if series.style is Style.STACKED:
            baseline = _draw_stacked(axes, series, colour, baseline)
        else:
            _draw_line(axes, series, colour)
    _scale(axes, chart)


def _colours(chart: Chart) -> list[str]:
    return [SERIES_COLOURS[i % len(SERIES_COLOURS)] for i in range(len(chart.series))]


def _draw_line(axes: Axes, series: Series, colour: str) -> None:
    values = [value if math.isfinite(value) else math.nan for value in series.values]
    faint = series.style is Style.BAND
    points = series.style is Style.POINTS
    few = len(values) <= _MARKER_LIMIT
    large = points or len(values) == 1
    axes.plot(
        series.steps,
        values,
        label=series.label,
        color=colour,
        linewidth=1.2 if faint else 1.8,
        alpha=0.75 if faint else 1.0,
        marker="o" if points or few else "",
        markersize=4.5 if large else 2.5,
        zorder=3 if points else 2,
    )


def _draw_stacked(axes: Axes, series: Series, colour: str, baseline: list[float] | None) -> list[float]:
    """Draw one layer; each step reaches half-way to its neighbours. Returns the top of the layer."""
    below = baseline or [0.0] * len(series.values)
    top = [low + value for low, value in zip(below, series.values, strict=True)]
    inner = [(a + b) / 2 for a, b in zip(series.steps, series.steps[1:], strict=False)]
    edges = [series.steps[0] - 0.5, *inner, series.steps[-1] + 0.5]
    axes.stairs(top, edges, baseline=below, fill=True, color=colour, label=series.label, linewidth=0)
    return top


def _scale(axes: Axes, chart: Chart) -> None:
    finite = any(math.isfinite(value) for series in chart.series for value in series.values)
    if not finite:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center")
    elif chart.log_scale:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1.0,) if high > 1e3 * low else (1.0, 3.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        if chart.from_zero:
            zero = not any(value > 0 for series in chart.series for value in series.values)
            axes.set_ylim(0, 1 if zero else None)


def themed(svg: str, width: float, height: float) -> str:
    """Colours by name, so that the page's light and dark variables apply; of the inches only the shape counts."""
    names = {colour: f"var(--series-{i})" for i, colour in enumerate(SERIES_COLOURS, start=1)}
    for colour, variable in (names | {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--card)"}).items():
        svg = svg.replace(colour, variable)
    body = svg[svg.index("<svg") :].partition(">")[2]
    view_box = f'viewBox="0 0 {width * 72:g} {height * 72:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view_box} aria-hidden="true">{body}'
