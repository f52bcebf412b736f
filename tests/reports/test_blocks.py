import math

import pytest

from miles.reports.blocks import column_chart, resample, sparkline


def test_short_series_are_left_alone_and_long_ones_averaged() -> None:
    assert resample([1.0, 2.0, 3.0], 5) == [1.0, 2.0, 3.0]
    assert resample([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    columns = resample([float(value) for value in range(1000)], 60)
    assert len(columns) == 60
    assert columns == sorted(columns)


def test_missing_values_do_not_spread() -> None:
    assert resample([math.nan, 4.0, math.nan, math.nan], 2)[0] == 4.0
    assert math.isnan(resample([math.nan, 4.0, math.nan, math.nan], 2)[1])


def test_sparkline_spans_smallest_to_largest() -> None:
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([2.0, 2.0], 10) == "▅▅"
    assert sparkline([1.0, math.nan, 2.0], 10) == "▁ █"
    assert sparkline([math.nan], 10) == ""


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ([0.0, 1.0, 2.0], ["  █", " ▄█", "▁██"]),
        ([0.5, 5.0], [" █", " █", "▆█"]),
        ([math.nan, 2.0], [" █", " █", " █"]),
    ],
)
def test_columns_stand_on_the_lower_bound(values: list[float], rows: list[str]) -> None:
    assert column_chart(values, width=10, height=3, low=0.0, high=2.0) == rows
