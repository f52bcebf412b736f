from pathlib import Path

import pytest

from miles.errors import RunError
from miles.runs.attempts import begin_attempt
from miles.runs.logs import Choice, follow_logs, log_files, log_tails
from miles.runs.paths import RunPaths


def _write(paths: RunPaths, attempt: int, name: str, text: str) -> Path:
    file = paths.logs(attempt) / name
    with file.open("a") as stream:
        stream.write(text)
    return file


def test_newest_attempt_and_role_choose_the_files(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    begin_attempt(paths, "grpo")
    old = _write(paths, 1, "trainer-node-0.log", "old\n")
    begin_attempt(paths, "grpo")
    engine = _write(paths, 2, "engine-node-0.log", "ready\n")
    trainer = _write(paths, 2, "trainer-node-0.log", "step 1\n")
    assert log_files(paths, Choice()) == [engine, trainer]
    assert log_files(paths, Choice(role="engine")) == [engine]
    assert log_files(paths, Choice(1)) == [old]
    begin_attempt(paths, "report")
    report = _write(paths, 3, "step-node-0.log", "")
    assert log_files(paths, Choice()) == [report]
    assert log_files(paths, Choice(role="trainer")) == [trainer]
    assert log_files(paths, Choice(3, "trainer")) == []
    with pytest.raises(RunError, match="no attempt 9"):
        log_files(paths, Choice(9))
    with pytest.raises(RunError, match="Did you mean 'engine'"):
        log_files(paths, Choice(role="engines"))


def test_tail_is_the_last_lines_under_the_files_name(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    begin_attempt(paths, "grpo")
    file = _write(paths, 1, "trainer-node-0.log", "".join(f"line {n}\n" for n in range(1000)))
    assert list(log_tails(paths, Choice(), 2)) == [f"==> {file} <==", "line 998\nline 999"]


def test_following_writes_what_is_added_and_later_attempts(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    begin_attempt(paths, "warmup")
    first = _write(paths, 1, "trainer-node-0.log", "a\nb\n")
    written: list[str] = []
    second: list[Path] = []

    def running() -> bool:
        if len(written) == 2:
            _write(paths, 1, "trainer-node-0.log", "c\n")
        if len(written) == 3:
            begin_attempt(paths, "grpo")
            second.append(_write(paths, 2, "trainer-node-0.log", "d\n"))
        return len(written) < 4

    follow_logs(paths, Choice(), 1, written.append, running=running)
    assert written == [f"==> {first} <==", "b", "c", f"==> {second[0]} <==", "d"]


def test_node_and_job_choose_the_files(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    begin_attempt(paths, "grpo")
    files = [_write(paths, 1, f"trainer-gpu-{node}-{index}.log", "") for node in ("a1", "a2") for index in (0, 1)]
    assert log_files(paths, Choice(node="gpu-a2")) == files[2:]
    with pytest.raises(RunError, match="Did you mean 'gpu-a"):
        log_files(paths, Choice(node="gpu-a"))
    assert log_files(paths, Choice(role="job")) == []
    job = paths.slurm_log("grpo", 12)
    job.write_text("slurmstepd: error\n")
    assert log_files(paths, Choice(role="job")) == [job]
