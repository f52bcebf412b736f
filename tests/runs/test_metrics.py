import math
from pathlib import Path

from miles.runs.metrics import MetricsWriter, copy_stage, drop_stage, last_step, read_metrics
from miles.runs.paths import RunPaths


def test_lines_come_back_in_order_with_time(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    writer = MetricsWriter(paths, clock=iter([10.0, 11.5]).__next__)
    writer.write("warmup", 1, {"loss": 2.5})
    writer.write("grpo", 1, {"reward/mean": 0.25, "lr": 1})
    lines = read_metrics(paths)
    assert [(line.stage, line.step, line.time) for line in lines] == [("warmup", 1, 10.0), ("grpo", 1, 11.5)]
    assert lines[1].values == {"reward/mean": 0.25, "lr": 1.0}


def test_values_that_are_not_finite_are_valid_json_and_read_as_nan(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    MetricsWriter(paths).write("grpo", 1, {"loss": math.inf, "lr": 0.1})
    assert '"loss":null' in paths.metrics.read_text()
    values = read_metrics(paths)[0].values
    assert math.isnan(values["loss"])
    assert values["lr"] == 0.1


def test_dropping_a_stage_leaves_the_others_untouched(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    writer = MetricsWriter(paths)
    for step in (1, 2):
        writer.write("warmup", step, {"loss": math.nan})
        writer.write("grpo", step, {"loss": 1.0})
    kept = [line for line in paths.metrics.read_text().splitlines() if "warmup" in line]
    assert drop_stage(paths, "grpo") == 2
    assert paths.metrics.read_text().splitlines() == kept
    assert drop_stage(paths, "grpo") == 0


def test_dropping_after_a_step_keeps_what_came_before_and_a_copy_of_the_rest(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    writer = MetricsWriter(paths)
    writer.write("warmup", 9, {"loss": 1.0})
    for step in range(4):
        writer.write("grpo", step, {"loss": math.nan})
    lines = paths.metrics.read_text().splitlines()
    copy = tmp_path / "discarded/metrics.jsonl"
    assert last_step(paths, "grpo") == 3
    assert drop_stage(paths, "grpo", 3, copy=copy) == 0
    assert not copy.exists()
    assert drop_stage(paths, "grpo", 1, copy=copy) == 2
    assert paths.metrics.read_text().splitlines() == lines[:3]
    assert copy.read_text().splitlines() == lines[3:]
    assert last_step(paths, "grpo") == 1
    assert drop_stage(paths, "grpo") == 2
    assert last_step(paths, "grpo") is None
    assert last_step(paths, "warmup") == 9


def test_copy_into_another_run_takes_the_place_of_its_own_lines(tmp_path: Path) -> None:
    source, target = RunPaths(tmp_path / "a"), RunPaths(tmp_path / "b")
    for paths in (source, target):
        paths.root.mkdir()
    for step in (1, 2, 3):
        MetricsWriter(source).write("grpo", step, {"loss": step})
    MetricsWriter(target).write("warmup", 5, {"loss": 1.0})
    MetricsWriter(target).write("grpo", 7, {"loss": 1.0})
    assert copy_stage(source, target, "grpo", 2) == 2
    assert [(line.stage, line.step) for line in read_metrics(target)] == [("warmup", 5), ("grpo", 1), ("grpo", 2)]
    assert last_step(source, "grpo") == 3
