import signal
import subprocess
import sys
from pathlib import Path

from miles.runs.attempts import EndReason, Place, begin_attempt, end_attempt, read_attempts
from miles.runs.paths import RunPaths

BEGIN_AND_DIE = """
import os, signal, sys
from pathlib import Path
from miles.runs.attempts import begin_attempt
from miles.runs.paths import RunPaths
begin_attempt(RunPaths(Path(sys.argv[1])), "grpo")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_attempts_are_numbered_and_tell_why_they_ended(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert begin_attempt(paths, "warmup") == 1
    end_attempt(paths, 1, EndReason.FINISHED)
    assert begin_attempt(paths, "grpo", note="starts again") == 2
    end_attempt(paths, 2, EndReason.ENGINE_CRASH, exit_code=5, detail="engine 0 died")
    first, second = read_attempts(paths)
    assert (first.step, first.reason, first.exit_code) == ("warmup", EndReason.FINISHED, 0)
    assert (second.step, second.reason, second.note) == ("grpo", EndReason.ENGINE_CRASH, "starts again")
    assert second.detail == "engine 0 died"
    assert second.ended is not None
    assert second.ended >= second.started


def test_latest_logs_follow_the_newest_attempt(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for number in (1, 2):
        assert begin_attempt(paths, "grpo") == number
        assert paths.latest_logs.resolve() == paths.logs(number)
    assert paths.latest_logs.readlink() == Path("attempt-002")


def test_killed_attempt_has_no_end_and_its_number_is_not_used_again(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", BEGIN_AND_DIE, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    paths = RunPaths(tmp_path)
    assert begin_attempt(paths, "grpo") == 2
    killed, running = read_attempts(paths)
    assert killed.ended is None
    assert running.number == 2


def test_number_is_claimed_by_the_directory_even_without_a_ledger_line(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.logs(4).mkdir(parents=True)
    assert begin_attempt(paths, "grpo") == 5


def test_attempt_in_a_job_knows_its_place_and_can_be_closed_later(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    number = begin_attempt(paths, "grpo", place=Place(12, 1, ["n1", "n2"], 4, 100, [3, 4096]))
    end_attempt(paths, number, EndReason.PREEMPTED, ended=1.5e9)
    (attempt,) = read_attempts(paths)
    assert attempt.place == Place(12, 1, ["n1", "n2"], 4, 100, [3, 4096])
    assert (attempt.ended, attempt.exit_code) == (1.5e9, None)
