import math
from pathlib import Path

from miles.runs.paths import RunPaths
from miles.runs.samples import SampleRecord, drop_samples, read_samples, sampled_steps, write_samples


def test_transcripts_come_back_whole(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    records = [
        SampleRecord("sort 3 1 2\n", "1 2 3 ✓", ["1", "2", "3"], 1.0, {"exact": 1.0}, "stop", 5),
        SampleRecord("sort 2 1", "", None, None),
    ]
    file = write_samples(paths, "grpo", 12, records)
    assert file == tmp_path / "samples/grpo/step-000012.jsonl"
    assert read_samples(paths, "grpo", 12) == records
    assert read_samples(paths, "grpo", 13) == []


def test_steps_are_listed_in_order_of_number(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (2, 10, 1_000_000):
        write_samples(paths, "grpo", step, [])
    assert sampled_steps(paths, "grpo") == [2, 10, 1_000_000]


def test_dropping_a_stage_leaves_the_others(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_samples(paths, "warmup", 1, [])
    write_samples(paths, "grpo", 1, [])
    drop_samples(paths, "grpo")
    drop_samples(paths, "never-ran")
    assert sampled_steps(paths, "grpo") == []
    assert sampled_steps(paths, "warmup") == [1]


def test_reward_that_is_not_finite_is_read_as_none(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_samples(paths, "grpo", 1, [SampleRecord("p", "r", None, math.nan)])
    assert read_samples(paths, "grpo", 1)[0].reward is None


def test_dropping_after_a_step_keeps_the_steps_up_to_it(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (1, 2, 3):
        write_samples(paths, "grpo", step, [])
    drop_samples(paths, "grpo", 2)
    assert sampled_steps(paths, "grpo") == [1, 2]
