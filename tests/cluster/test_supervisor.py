"""Supervision of real processes. The workers and engines are stand-ins that misbehave on request."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from miles.cluster.ports import is_free
from miles.errors import DataError, EngineError, Interrupted, TrainerError
from miles.runs.attempts import Attempt, EndReason, read_attempts
from miles.runs.claim import current_holder
from miles.runs.failures import read_failure
from miles.runs.metrics import MetricsWriter, read_metrics
from miles.runs.paths import RunPaths
from miles.runs.samples import sampled_steps, write_samples
from miles.workflow.done import read_done
from tests.cluster.helpers import STEP, Supervise, gone, recorded_processes, wait_for, waiting_pids


def _end(process: subprocess.Popen[str], paths: RunPaths) -> tuple[int, Attempt]:
    """Exit code and last attempt of a supervisor, after which none of its processes is left."""
    code = process.wait(timeout=120)
    assert [record for record in recorded_processes(paths) if not gone(record["pid"])] == []
    return code, read_attempts(paths)[-1]


def test_step_runs_on_ranks_with_engines_and_is_recorded_as_done(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = _end(supervise(ranks=2, engines=2), paths)
    assert (code, attempt.reason) == (0, EndReason.FINISHED)
    done = read_done(paths, STEP)
    assert done is not None
    assert set(done.outputs) == {"rank-0.json", "rank-1.json"}
    ranks = [json.loads((paths.step(STEP) / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) for env in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    urls = ranks[0]["MILES_ENGINE_URLS"].split(",")
    assert len(set(urls)) == 2
    assert ranks[1]["MILES_ENGINE_URLS"].split(",") == urls
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"] not in [url.rpartition(":")[2] for url in urls]
    assert all(is_free(int(url.rpartition(":")[2])) for url in urls), "the engines are gone"
    assert {path.name.split("-")[0] for path in paths.latest_logs.glob("*.log")} == {"engine", "trainer"}


def test_engine_token_is_on_no_command_line_and_in_no_environment(paths: RunPaths, supervise: Supervise) -> None:
    token = paths.engine_token.read_text().strip()
    process = supervise(worker="obey", engines=1)
    waiting_pids(paths)
    for record in recorded_processes(paths):
        proc = Path("/proc") / str(record["pid"])
        assert token.encode() not in (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
    process.terminate()
    _end(process, paths)


def test_engine_that_cannot_start_ends_the_step_with_the_end_of_its_log(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = _end(supervise(engine="one-crashes", engines=2), paths)
    assert (code, attempt.reason) == (EngineError.exit_code, EndReason.ENGINE_START)
    failure = read_failure(paths.root / "failure.json")
    assert isinstance(failure, EngineError)
    assert "engine 1" in failure.message
    assert "exit code 3" in failure.message
    assert failure.message.endswith("engine standing in\ncannot load the weights")
    assert not list(paths.latest_logs.glob("trainer-*")), "no rank was started"
    assert read_done(paths, STEP) is None


def test_engine_that_never_answers_is_given_up_after_its_timeout(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = _end(supervise(engine="silent", engines=1, timeout=2.0), paths)
    assert (code, attempt.reason) == (EngineError.exit_code, EndReason.ENGINE_START)
    assert "engine 0 did not answer within 2 s" in attempt.detail


def test_engine_whose_port_was_taken_starts_on_another(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = _end(supervise(engine="robbed", engines=1), paths)
    assert (code, attempt.reason) == (0, EndReason.FINISHED)
    url = json.loads((paths.step(STEP) / "rank-0.json").read_text())["MILES_ENGINE_URLS"]
    assert url.rpartition(":")[2] != (paths.root / "robbed").read_text()


@pytest.mark.parametrize(
    ("role", "error", "reason"),
    [("engine", EngineError, EndReason.ENGINE_CRASH), ("trainer", TrainerError, EndReason.TRAINER_CRASH)],
)
def test_killed_process_ends_all_others(
    paths: RunPaths, supervise: Supervise, role: str, error: type[EngineError], reason: EndReason
) -> None:
    process = supervise(worker="obey", ranks=2, engines=1)
    started = waiting_pids(paths, 0) + waiting_pids(paths, 1)
    victim = next(record["pid"] for record in recorded_processes(paths) if record["role"] == role)
    os.kill(victim, signal.SIGKILL)
    code, attempt = _end(process, paths)
    assert (code, attempt.reason) == (error.exit_code, reason)
    assert f"{role} 0 (process {victim}) was killed by SIGKILL" in attempt.detail
    wait_for(lambda: all(gone(pid) for pid in started), "what the ranks had started to go")


def test_failing_rank_is_named_with_the_end_of_its_log(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = _end(supervise(worker="fail", ranks=2), paths)
    assert (code, attempt.reason, attempt.exit_code) == (6, EndReason.TRAINER_CRASH, 6)
    assert "trainer 1" in attempt.detail
    assert "exit code 7" in attempt.detail
    assert attempt.detail.endswith("the last word of rank 1")


def test_error_that_a_rank_explains_is_the_error_of_the_step(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = _end(supervise(worker="explain", ranks=2), paths)
    assert (code, attempt.reason) == (DataError.exit_code, EndReason.FAILED)
    failure = read_failure(paths.root / "failure.json")
    assert isinstance(failure, DataError)
    assert (failure.message, failure.fix) == ("prompt 17 is longer than the context", "set data.too_long")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_stops_the_step_at_the_ranks_boundary(
    paths: RunPaths, supervise: Supervise, number: signal.Signals
) -> None:
    process = supervise(worker="obey", ranks=2, engines=1)
    started = waiting_pids(paths, 0) + waiting_pids(paths, 1)
    process.send_signal(number)
    code, attempt = _end(process, paths)
    assert (code, attempt.reason) == (Interrupted.exit_code, EndReason.STOPPED)
    assert read_done(paths, STEP) is None
    assert current_holder(paths) is None
    wait_for(lambda: all(gone(pid) for pid in started), "what the ranks had started to go")


def test_step_that_finishes_while_it_is_stopped_is_done(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="finish")
    waiting_pids(paths)
    process.terminate()
    code, attempt = _end(process, paths)
    assert (code, attempt.reason) == (0, EndReason.FINISHED)
    assert read_done(paths, STEP) is not None


def test_second_signal_does_not_wait_for_ranks_that_do_not_listen(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="deaf")
    rank, grandchild = waiting_pids(paths)
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    process.terminate()
    code, attempt = _end(process, paths)
    assert (code, attempt.reason) == (Interrupted.exit_code, EndReason.STOPPED)
    wait_for(lambda: gone(rank) and gone(grandchild), "the rank's process group to go")


def test_leftovers_of_a_killed_supervisor_are_ended_before_the_next_attempt(
    paths: RunPaths, supervise: Supervise
) -> None:
    first = supervise(worker="deaf", engines=1)
    left = waiting_pids(paths)
    first.kill()
    first.wait()
    assert not any(gone(pid) for pid in left)
    code, _ = _end(supervise(worker="succeed"), paths)
    assert code == 0
    wait_for(lambda: all(gone(pid) for pid in left), "the leftovers to go")
    killed, finished = read_attempts(paths)
    assert (killed.ended, finished.reason) == (None, EndReason.FINISHED)


def test_interrupted_step_starts_from_its_beginning_and_says_so(paths: RunPaths, supervise: Supervise) -> None:
    MetricsWriter(paths).write("other", 1, {"loss": 2.0})
    MetricsWriter(paths).write(STEP, 1, {"loss": 2.0})
    MetricsWriter(paths).write(STEP, 2, {"loss": 2.0})
    write_samples(paths, STEP, 2, [])
    paths.step(STEP).mkdir()
    (paths.step(STEP) / "half-written").touch()
    code, attempt = _end(supervise(), paths)
    assert code == 0
    assert "starts again from its beginning" in attempt.note
    assert "2 metrics lines" in attempt.note
    assert [line.stage for line in read_metrics(paths)] == ["other"]
    assert sampled_steps(paths, STEP) == []
    assert not (paths.step(STEP) / "half-written").exists()


def test_second_supervisor_of_a_run_is_refused(paths: RunPaths, supervise: Supervise) -> None:
    first = supervise(worker="obey")
    waiting_pids(paths)
    second = supervise()
    assert second.wait(timeout=60) == 4
    failure = read_failure(paths.root / "failure.json")
    assert failure is not None
    assert f"in use by process {first.pid}" in failure.message
    first.terminate()
    _, attempt = _end(first, paths)
    assert attempt.number == 1
