from pathlib import Path

from miles.runs.paths import RunPaths
from miles.runs.progress import Progress, read_progress, write_progress


def test_progress_is_replaced(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert read_progress(paths) is None
    write_progress(paths, Progress("grpo", "rl", 1, 60, "generate", 3, 32))
    write_progress(paths, Progress("grpo", "rl", 2, 60, "update"))
    assert read_progress(paths) == Progress("grpo", "rl", 2, 60, "update", 0, 0)
    assert list(tmp_path.iterdir()) == [paths.progress]
