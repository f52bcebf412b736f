import math

from hypothesis import given
from hypothesis import strategies as st

from miles.runs.attempts import Attempt, EndReason
from miles.training.interval import mean_time_between_failures, save_interval

seconds = st.floats(0.01, 1e6)


def overhead(interval: float, save: float, mtbf: float) -> float:
    """Expected time per second of work, exponential failures, no time to restart (Daly 2006, equation 20)."""
    return mtbf * math.expm1((interval + save) / mtbf) / interval


@given(save=st.floats(0.1, 100.0), mtbf=st.floats(1000.0, 1e6))
def test_no_other_interval_is_noticeably_better(save: float, mtbf: float) -> None:
    best = save_interval(save, mtbf)
    others = [best * factor for factor in (0.5, 0.8, 0.95, 1.05, 1.25, 2.0)]
    assert overhead(best, save, mtbf) <= 1.002 * min(overhead(other, save, mtbf) for other in others)


def test_rare_failures_and_cheap_saves_give_youngs_formula() -> None:
    assert save_interval(1.0, 1e6) == math.sqrt(2e6) * (1 + math.sqrt(0.5e-6) / 3 + 0.5e-6 / 9) - 1.0


@given(save=seconds, mtbf=seconds)
def test_is_positive_and_grows_when_less_has_to_be_repeated(save: float, mtbf: float) -> None:
    assert 0 < save_interval(save, mtbf) <= save_interval(save, mtbf, 0.25)


def attempt(number: int, started: float, ended: float | None, reason: EndReason | None) -> Attempt:
    return Attempt(number, "grpo", "host", started, ended=ended, reason=reason)


def test_a_young_run_believes_the_prior() -> None:
    assert mean_time_between_failures([], prior=3600.0, now=0.0) == 3600.0
    running = [attempt(1, 0.0, None, None)]
    assert mean_time_between_failures(running, prior=3600.0, now=400.0) == 4000.0


def test_kills_and_crashes_count_and_planned_ends_do_not() -> None:
    attempts = [
        attempt(1, 0.0, None, None),  # killed
        attempt(2, 100.0, 200.0, EndReason.ENGINE_CRASH),
        attempt(3, 300.0, 400.0, EndReason.STOPPED),
        attempt(4, 500.0, None, None),  # running
    ]
    assert mean_time_between_failures(attempts, prior=500.0, now=700.0) == (500 + 100 + 100 + 100 + 200) / 3
