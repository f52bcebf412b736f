"""What is plotted: metrics lines to charts."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from miles.reports.charts import Chart, Style, stage_charts, stages_of
from miles.runs.metrics import MetricsLine


def _lines(*steps: dict[str, float], stage: str = "train") -> list[MetricsLine]:
    return [MetricsLine(stage, number, 0.0, values) for number, values in enumerate(steps, start=1)]


def _chart(charts: list[Chart], key: str) -> Chart:
    return next(chart for chart in charts if chart.key == key)


def test_no_lines_give_no_charts() -> None:
    assert stage_charts("train", []) == []
    assert stages_of([]) == []


def test_reward_shows_training_at_every_step_and_held_out_where_it_was_measured() -> None:
    charts = stage_charts("train", _lines({"reward/mean": 0.1, "eval/reward": 0.2}, {"reward/mean": 0.3}))
    training, held_out = _chart(charts, "reward").series
    assert (training.steps, training.values, training.style) == ([1, 2], [0.1, 0.3], Style.LINE)
    assert (held_out.steps, held_out.values, held_out.style) == ([1], [0.2], Style.POINTS)


def test_stages_do_not_mix() -> None:
    lines = _lines({"loss": 1.0}, stage="warmup") + _lines({"loss": 2.0}, stage="train")
    assert stages_of(lines) == ["warmup", "train"]
    assert _chart(stage_charts("train", lines), "loss").series[0].values == [2.0]


def test_a_step_that_a_resumed_attempt_repeated_counts_once_with_its_later_value() -> None:
    lines = _lines({"loss": 1.0}, {"loss": 2.0}) + _lines({"loss": 1.0}, {"loss": 5.0})
    assert _chart(stage_charts("train", lines), "loss").series[0].values == [1.0, 5.0]


def test_pass_at_k_is_in_the_order_of_k() -> None:
    charts = stage_charts("train", _lines({"eval/pass@16": 0.9, "eval/pass@1": 0.1, "eval/pass@4": 0.5}))
    assert [series.label for series in _chart(charts, "pass").series] == ["pass@1", "pass@4", "pass@16"]


def test_graders_have_a_chart_when_there_are_several() -> None:
    one = stage_charts("train", _lines({"reward/mean": 1.0, "reward/std": 0.0, "reward/exact": 1.0}))
    two = stage_charts("train", _lines({"reward/mean": 1.0, "reward/exact": 1.0, "reward/math": 0.5}))
    assert "graders" not in {chart.key for chart in one}
    assert [series.label for series in _chart(two, "graders").series] == ["exact", "math"]


def test_mismatch_is_logarithmic_only_where_values_span_more_than_a_decade() -> None:
    name, extreme = "mismatch/log_prob_abs_diff_mean", "mismatch/log_prob_abs_diff_max"
    assert _chart(stage_charts("train", _lines({name: 1e-7, extreme: 1e-5})), "mismatch").log_scale
    assert not _chart(stage_charts("train", _lines({name: 1e-7, extreme: 2e-7})), "mismatch").log_scale
    assert not _chart(stage_charts("train", _lines({name: 0.0, extreme: 0.0})), "mismatch").log_scale
    assert not _chart(stage_charts("train", _lines({name: math.nan, extreme: math.nan})), "mismatch").log_scale


def test_phases_follow_the_order_of_a_step_and_unknown_ones_come_after() -> None:
    values = {"time/step": 10.0, "time/update": 3.0, "time/generate": 4.0, "time/zip": 1.0, "time/sync": 0.0}
    series = _chart(stage_charts("train", _lines(values)), "time").series
    assert [(one.label, one.values) for one in series] == [
        ("generate", [4.0]),
        ("update", [3.0]),
        ("zip", [1.0]),
        ("other", [2.0]),
    ]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"time/step": st.floats(0, 1e3)},
            optional={"time/generate": st.floats(0, 400), "time/update": st.just(math.nan)},
        ),
        min_size=1,
        max_size=8,
    )
)
def test_layers_of_a_step_add_up_to_its_time_or_to_its_phases(steps: list[dict[str, float]]) -> None:
    charts = stage_charts("train", _lines(*steps))
    for index, values in enumerate(steps):
        total = sum(series.values[index] for chart in charts for series in chart.series)
        expected = max(values["time/step"], values.get("time/generate", 0.0))
        assert math.isclose(total, expected, rel_tol=1e-9, abs_tol=1e-9)
