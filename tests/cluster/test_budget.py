from pathlib import Path

import pytest

from miles.cluster.budget import attempts_since_submit, check_budget, idle_attempts, progress_of
from miles.errors import RunError
from miles.runs.attempts import Attempt, EndReason, Place
from miles.runs.files import append_json
from miles.runs.paths import RunPaths


def attempt(number: int, step: int, journal: int = 0, reason: EndReason = EndReason.TRAINER_CRASH) -> Attempt:
    place = Place(12, number - 1, ("n1",), 1, 0, (step, journal))
    return Attempt(
        number, "grpo", "n1", 100.0 * number, ended=1.0, reason=reason, detail="the cause\nmore", place=place
    )


@pytest.mark.parametrize(
    ("attempts", "now", "idle"),
    [
        ([], (0, 0), []),
        ([attempt(1, 0)], (0, 0), [1]),
        ([attempt(1, 0)], (0, 4096), []),
        ([attempt(1, 0, 4096)], (1, 0), []),
        ([attempt(1, 0), attempt(2, 0), attempt(3, 0)], (0, 0), [1, 2, 3]),
        ([attempt(1, 0), attempt(2, 3), attempt(3, 3)], (3, 0), [2, 3]),
        ([attempt(1, 0), attempt(2, 0), attempt(3, 0)], (1, 0), []),
        ([attempt(1, 5)], (4, 0), [1]),
        ([attempt(1, 0, reason=EndReason.PREEMPTED), attempt(2, 0, reason=EndReason.NODE_FAILURE)], (0, 0), []),
        ([attempt(1, 0), attempt(2, 0, reason=EndReason.PREEMPTED), attempt(3, 0)], (0, 0), [1, 3]),
        ([attempt(1, 0, reason=EndReason.TIME_LIMIT), attempt(2, 0, reason=EndReason.KILLED)], (0, 0), [1, 2]),
    ],
)
def test_attempts_that_left_nothing(attempts: list[Attempt], now: tuple[int, int], idle: list[int]) -> None:
    assert [one.number for one in idle_attempts(attempts, now)] == idle


def _check(attempts: list[Attempt], now: tuple[int, int], *, most: int = 10) -> None:
    check_budget("grpo", attempts, now, max_attempts=most, max_idle=2, run="demo")


def test_budget_is_spent_with_the_causes() -> None:
    _check([attempt(1, 0)], (0, 0))
    _check([attempt(1, 0), attempt(2, 1)], (2, 0), most=3)
    with pytest.raises(
        RunError, match=r"had 2 attempts \(slurm.max_attempts = 2\); the last ended: trainer-crash, the cause"
    ):
        _check([attempt(1, 0), attempt(2, 1)], (2, 0), most=2)
    crash = attempt(2, 0, reason=EndReason.OUT_OF_MEMORY)
    with pytest.raises(RunError, match=r"attempt 1: trainer-crash, the cause; attempt 2: out-of-memory, the cause"):
        _check([attempt(1, 0), crash], (0, 0))


def test_a_person_who_submits_again_starts_a_new_budget(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    attempts = [attempt(1, 0), attempt(2, 0), Attempt(3, "grpo", "laptop", 300.0)]
    assert [one.number for one in attempts_since_submit(paths, "grpo", attempts)] == [1, 2]
    append_json(paths.jobs, {"step": "grpo", "job": 12, "time": 150.0})
    append_json(paths.jobs, {"step": "report", "job": 13, "time": 900.0})
    assert [one.number for one in attempts_since_submit(paths, "grpo", attempts)] == [2]


def test_progress_is_steps_and_the_journal_beyond(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert progress_of(paths, "grpo") == (0, 0)
    for step, file, size in [(1, "batch-ab.h5", 9), (1, "segment-000001-ab.h5", 7), (2, "segment-000001-cd.h5", 5)]:
        directory = paths.journal("grpo") / f"step-{step:06d}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(b"x" * size)
    assert progress_of(paths, "grpo") == (1, 5)
