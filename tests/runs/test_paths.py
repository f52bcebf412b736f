from pathlib import Path

from miles.runs.paths import RunPaths


def test_references_resolve_into_the_step_and_other_paths_stay() -> None:
    paths = RunPaths(Path("/runs/demo"))
    assert paths.resolve("step:prepare/model") == Path("/runs/demo/steps/prepare/model")
    assert paths.resolve("step:prepare/data/train.jsonl") == Path("/runs/demo/steps/prepare/data/train.jsonl")
    assert paths.resolve("/models/qwen") == Path("/models/qwen")


def test_logs_of_an_attempt_are_numbered() -> None:
    assert RunPaths(Path("/r")).logs(7) == Path("/r/logs/attempt-007")
