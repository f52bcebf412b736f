import math
from pathlib import Path

from miles.runs.metrics import MetricsWriter, drop_stage, read_metrics
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
