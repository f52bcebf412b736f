"""Learning-rate schedules at the steps where their value is known."""

import pytest

from miles.config.schema import Schedule, TrainSection
from miles.training.schedule import learning_rate


def train(schedule: Schedule, **changes: float) -> TrainSection:
    values = {"steps": 11, "lr": 1.0, "min_lr": 0.1, "lr_warmup_steps": 0} | changes
    return TrainSection(lr_schedule=schedule, **values)


def test_constant() -> None:
    assert [learning_rate(train(Schedule.CONSTANT), step) for step in range(1, 12)] == [1.0] * 11


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warmup_rises_from_lr_over_warmup_to_lr(schedule: Schedule) -> None:
    section = train(schedule, lr_warmup_steps=4)
    assert [learning_rate(section, step) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [Schedule.LINEAR, Schedule.COSINE])
@pytest.mark.parametrize("warmup", [0, 4])
def test_decay_ends_at_min_lr_through_the_middle(schedule: Schedule, warmup: int) -> None:
    section = train(schedule, lr_warmup_steps=warmup)
    assert learning_rate(section, warmup + 1) == 1.0
    assert learning_rate(section, (12 + warmup) // 2) == pytest.approx(0.55)
    assert learning_rate(section, 11) == pytest.approx(0.1)


def test_linear_is_a_line_and_cosine_starts_flat() -> None:
    assert learning_rate(train(Schedule.LINEAR), 2) == pytest.approx(0.91)
    assert learning_rate(train(Schedule.COSINE), 2) == pytest.approx(0.978, abs=1e-3)


def test_warmup_as_long_as_the_run() -> None:
    section = train(Schedule.COSINE, lr_warmup_steps=11)
    assert learning_rate(section, 11) == 1.0


def test_a_run_of_one_step_uses_lr() -> None:
    assert learning_rate(train(Schedule.LINEAR, steps=1), 1) == 1.0
