"""Where the time went: ledgers and metrics to attempts and waits, and the section of the page that shows them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.cluster.slurm.jobs import JobKind, JobRecord, append_job
from miles.reports.html import write_report
from miles.reports.timeline import Ending, Timeline, timeline_of
from miles.runs.attempts import Attempt, EndReason, Place, begin_attempt, end_attempt
from miles.runs.metrics import MetricsLine, MetricsWriter
from miles.runs.paths import RunPaths
from tests.reports.example_run import create_example


def _attempt(
    number: int, started: float, ended: float | None, reason: EndReason | None = EndReason.FINISHED, job: int = 0
) -> Attempt:
    place = Place(job, 0, ["n1", "n2"], 2, 0, [0, 0]) if job else None
    reason = None if ended is None else reason
    return Attempt(number, "grpo", "n1", started, ended=ended, reason=reason, place=place)


def _job(job: int, time: float, element: int | None = None) -> JobRecord:
    return JobRecord("grpo", job, JobKind.FIRST, "x.sbatch", time, None, element)


def _step(step: int, time: float, seconds: float = 1.0) -> MetricsLine:
    return MetricsLine("grpo", step, time, {"time/step": seconds})


def _timeline(
    attempts: list[Attempt],
    jobs: list[JobRecord] | None = None,
    lines: list[MetricsLine] | None = None,
    running_at: float | None = None,
) -> Timeline:
    timeline = timeline_of(attempts, jobs or [], lines or [], running_at=running_at)
    assert timeline is not None
    return timeline


def test_a_run_without_attempts_has_no_timeline() -> None:
    assert timeline_of([], [_job(4, 0.0)], [], running_at=None) is None


def test_every_reason_of_an_end_has_its_kind() -> None:
    for reason in EndReason:
        (bar,) = _timeline([_attempt(1, 0.0, 1.0, reason)]).bars
        assert bar.ending is not Ending.OPEN


def test_waits_of_a_job_are_in_the_queue_from_its_submission_on() -> None:
    attempts = [_attempt(1, 110.0, 200.0, EndReason.PREEMPTED, job=4), _attempt(2, 230.0, 300.0, job=4)]
    timeline = _timeline(attempts, [_job(4, 100.0)])
    assert [(wait.started, wait.until, wait.queued) for wait in timeline.waits] == [
        (100.0, 110.0, True),
        (200.0, 230.0, True),
    ]
    assert (timeline.wall, timeline.busy, timeline.waited(queued=True)) == (200.0, 160.0, 40.0)


def test_time_before_a_later_submission_is_nobodys() -> None:
    attempts = [_attempt(1, 0.0, 100.0, EndReason.FAILED, job=4), _attempt(2, 500.0, 600.0, job=5)]
    timeline = _timeline(attempts, [_job(4, 0.0), _job(5, 480.0)])
    assert (timeline.waited(queued=False), timeline.waited(queued=True)) == (380.0, 20.0)


def test_without_slurm_nothing_is_in_a_queue() -> None:
    timeline = _timeline([_attempt(1, 0.0, 10.0), _attempt(2, 15.0, 20.0)])
    assert (timeline.waited(queued=False), timeline.waited(queued=True)) == (5.0, 0.0)
    assert [bar.place for bar in timeline.bars] == ["", ""]


def test_an_element_of_an_array_goes_by_the_name_that_commands_take() -> None:
    timeline = _timeline([_attempt(1, 20.0, 30.0, job=55)], [_job(53, 10.0, element=2)])
    assert timeline.bars[0].place == "job 53_2, 2 nodes"
    assert timeline.waited(queued=True) == 10.0


def test_an_attempt_without_an_end_reaches_to_its_last_metrics_and_not_into_the_next() -> None:
    attempts = [_attempt(1, 0.0, None), _attempt(2, 50.0, None)]
    timeline = _timeline(attempts, lines=[_step(1, 10.0), _step(2, 30.0), _step(3, 60.0)])
    assert [(bar.until, bar.seconds, bar.ending) for bar in timeline.bars] == [
        (30.0, None, Ending.OPEN),
        (60.0, None, Ending.OPEN),
    ]


def test_the_last_attempt_reaches_to_now_where_it_is_known_to_run() -> None:
    attempts = [_attempt(1, 0.0, None), _attempt(2, 50.0, None)]
    assert [bar.until for bar in _timeline(attempts, running_at=90.0).bars] == [0.0, 90.0]
    assert [bar.until for bar in _timeline([_attempt(1, 0.0, 5.0)], running_at=90.0).bars] == [5.0]


def test_new_steps_count_once_and_copied_ones_not_at_all() -> None:
    lines = [
        _step(1, 5.0),
        _step(0, 101.0, 50.0),
        _step(2, 110.0, 4.0),
        _step(2, 120.0, 6.0),
        _step(3, 130.0, math.nan),
    ]
    timeline = _timeline([_attempt(1, 100.0, 140.0)], lines=lines)
    assert timeline.new == 6.0
    assert timeline.reached == {"grpo": [(110.0, 2), (130.0, 3)]}
    assert _timeline([_attempt(1, 100.0, 140.0)]).new is None


def test_a_step_takes_no_longer_than_its_attempt() -> None:
    assert _timeline([_attempt(1, 100.0, 140.0)], lines=[_step(1, 130.0, 1e6)]).new == 30.0


def test_a_clock_that_was_set_back_is_said_and_gives_no_negative_time() -> None:
    timeline = _timeline([_attempt(1, 100.0, 40.0), _attempt(2, 50.0, 80.0)])
    assert timeline.clock_set_back
    assert timeline.bars[0].seconds is None
    assert timeline.wall == 50.0 and timeline.busy == 30.0
    assert not _timeline([_attempt(1, 0.0, 40.0), _attempt(2, 50.0, 80.0)]).clock_set_back


@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.none() | st.integers(-50, 300), st.integers(0, 3)), min_size=1, max_size=9
    ),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 500)), max_size=4),
)
def test_attempts_and_waits_add_up_to_the_wall_time(
    spans: list[tuple[int, int | None, int]], submissions: list[tuple[int, int]]
) -> None:
    attempts = [
        _attempt(number, float(start), None if length is None else float(start + length), job=job)
        for number, (start, length, job) in enumerate(spans, start=1)
    ]
    timeline = _timeline(attempts, [_job(job, float(time)) for job, time in submissions])
    assert timeline.busy + timeline.waited(queued=True) + timeline.waited(queued=False) == timeline.wall
    assert all(wait.started < wait.until for wait in timeline.waits)


def _write(paths: RunPaths, attempts: list[tuple[float, float, EndReason]], note: str = "", job: int = 0) -> None:
    """The ledger, with invented times in the places of its own."""
    for number, (_, _, reason) in enumerate(attempts, start=1):
        place = Place(job, number, [f"n{i}" for i in range(1 + number % 3)], 2, 0, [0, 0]) if job else None
        assert begin_attempt(paths, "grpo", note=note, place=place) == number
        end_attempt(paths, number, reason)
    records = [json.loads(line) for line in paths.attempts.read_text().splitlines()]
    for record in records:
        record["time"] = attempts[record["attempt"] - 1][0 if record["event"] == "start" else 1]
    paths.attempts.write_text("".join(json.dumps(record) + "\n" for record in records))


def _section(page: Path) -> str:
    source = page.read_text(encoding="utf-8")
    return source[source.index('<h2 id="attempts">') : source.index('<h2 id="run">')]


def _words(section: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", section))


def test_one_attempt_is_a_line_of_words(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    _write(paths, [(1000.0, 1090.0, EndReason.FINISHED)])
    page = write_report(paths.root)
    assert "One attempt, of grpo: finished after 1 min 30 s." in _words(_section(page))
    assert "<svg" not in _section(page)
    assert not (page.parent / "attempts.png").exists()


def test_several_attempts_are_drawn_over_days_and_say_what_they_were(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    day = 86400.0
    _write(paths, [(day, 1.9 * day, EndReason.PREEMPTED), (2.1 * day, 4 * day, EndReason.FINISHED)], "<b>note", job=4)
    append_job(paths, JobRecord("grpo", 4, JobKind.FIRST, "x", 0.9 * day, None))
    writer = MetricsWriter(paths, clock=iter([1.2 * day, 1.5 * day, 3 * day]).__next__)
    for step in (1, 2, 3):
        writer.write("grpo", step, {"time/step": 0.1 * day})
    page = write_report(paths.root)
    section, words = _section(page), _words(_section(page))
    assert "Wall time 74 h 24 min" in words and "In attempts 67 h 12 min, 90 %" in words
    assert "On new training steps 7 h 12 min, 10 %" in words and "In the queue 7 h 12 min, 10 %" in words
    assert "attempt 1 of grpo, job 4, 2 nodes" in words and "preempted after 21 h 36 min" in words
    assert "training step" in section and "<b>note" not in section and "&lt;b&gt;note" in section
    assert (page.parent / "attempts.png").read_bytes().startswith(b"\x89PNG")
    assert re.findall(r"#[0-9a-fA-F]{6}", section) == []


def test_of_hundreds_of_attempts_the_table_shows_the_last(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    _write(paths, [(100.0 * n, 100.0 * n + 90, EndReason.TIME_LIMIT) for n in range(1, 201)])
    section = _section(write_report(paths.root))
    assert "The last 50 attempts; 150 more are in attempts.jsonl." in _words(section)
    assert section.count("<tr>") == 51
    assert section.count("<title>attempt ") == 200


@pytest.mark.parametrize("times", [[(5000.0, 10.0), (20.0, 30.0)], [(7.0, 7.0), (7.0, 7.0)]])
def test_times_that_cannot_be_are_drawn(tmp_path: Path, times: list[tuple[float, float]]) -> None:
    paths = create_example(tmp_path)
    _write(paths, [(start, end, EndReason.KILLED) for start, end in times])
    section = _section(write_report(paths.root))
    assert ("A clock was set back" in section) is (times[0][1] < times[0][0])
    assert "nan" not in section
