"""How an attempt ends that is stopped, out of time, overtaken or killed; what is left of it then."""

import os
import shutil
import signal
import subprocess

import pytest

from miles.errors import Interrupted, RunError
from miles.runs.attempts import EndReason, read_attempts
from miles.runs.claim import current_holder
from miles.runs.endpoints import read_endpoints
from miles.runs.failures import read_failure
from miles.runs.paths import RunPaths
from miles.workflow.done import read_done
from tests.cluster.helpers import STEP, Supervise, end_of, gone, newest_pid, wait_for, waiting_pids


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_stops_the_step_at_the_ranks_boundary(
    paths: RunPaths, supervise: Supervise, number: signal.Signals
) -> None:
    process = supervise(worker="obey", ranks=2, engines=1)
    started = waiting_pids(paths, 0) + waiting_pids(paths, 1)
    process.send_signal(number)
    code, attempt = end_of(process, paths)
    assert (code, attempt.reason) == (Interrupted.exit_code, EndReason.STOPPED)
    assert attempt.detail == f"step '{STEP}' was stopped"
    assert read_done(paths, STEP) is None
    assert current_holder(paths) is None
    wait_for(lambda: all(gone(pid) for pid in started), "what the ranks had started to go")


def test_engines_live_on_while_the_ranks_wind_down(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="deaf", engines=1)
    waiting_pids(paths)
    wait_for(lambda: read_endpoints(paths.engines(1))[0].ready, "the engine")
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    assert not gone(newest_pid(paths, "engine"))
    process.terminate()
    end_of(process, paths)


def test_step_that_finishes_while_it_is_stopped_is_done(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="finish")
    waiting_pids(paths)
    process.terminate()
    code, attempt = end_of(process, paths)
    assert (code, attempt.reason) == (0, EndReason.FINISHED)
    assert read_done(paths, STEP) is not None


def test_stop_says_what_could_not_be_saved(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="full")
    waiting_pids(paths)
    process.terminate()
    code, attempt = end_of(process, paths)
    assert (code, attempt.reason) == (Interrupted.exit_code, EndReason.STOPPED)
    assert attempt.detail == f"step '{STEP}' was stopped; trainer 0 could not end in order: the disk is full"


def test_second_signal_does_not_wait_for_ranks_that_do_not_listen(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="deaf")
    rank, grandchild = waiting_pids(paths)
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    process.terminate()
    code, attempt = end_of(process, paths)
    assert (code, attempt.reason) == (Interrupted.exit_code, EndReason.STOPPED)
    assert "trainer 0 had not ended after" in attempt.detail
    wait_for(lambda: gone(rank) and gone(grandchild), "the rank's process group to go")


def test_ranks_that_end_for_the_time_limit_are_waited_for(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = end_of(supervise(worker="punctual", ranks=2, local={"time_limit_minutes": 60}), paths)
    assert (code, attempt.reason) == (Interrupted.exit_code, EndReason.TIME_LIMIT)
    assert attempt.detail == f"step '{STEP}' came to its time limit of 60 minutes"
    failures = sorted(paths.latest_logs.glob("trainer-*.failure.json"))
    assert [type(read_failure(file)) for file in failures] == [Interrupted, Interrupted]
    failure = read_failure(paths.root / "failure.json")
    assert failure is not None
    assert failure.fix == f"`miles resume {paths.root}` continues the run"


def test_ranks_that_miss_the_time_limit_are_ended(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = end_of(supervise(worker="obey", local={"time_limit_minutes": 0.05}), paths)
    assert (code, attempt.reason) == (Interrupted.exit_code, EndReason.TIME_LIMIT)
    assert attempt.detail.endswith("0.05 minutes and did not end in time by itself")


@pytest.mark.parametrize("worker", ["finish", "obey"])
def test_overtaken_attempt_records_nothing(paths: RunPaths, supervise: Supervise, worker: str) -> None:
    process = supervise(worker=worker)
    waiting_pids(paths)
    shutil.copy(paths.claims / "000001.json", paths.claims / "000002.json")
    process.terminate()
    assert process.wait(timeout=60) == RunError.exit_code
    assert [attempt.ended for attempt in read_attempts(paths)] == [None]
    assert read_done(paths, STEP) is None
    failure = read_failure(paths.root / "failure.json")
    assert failure is not None
    assert "a newer attempt drives run" in failure.message
    assert gone(newest_pid(paths, "trainer"))


def test_overtaken_attempt_ends_by_itself(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="obey")
    waiting_pids(paths)
    shutil.copy(paths.claims / "000001.json", paths.claims / "000002.json")
    assert process.wait(timeout=60) == RunError.exit_code
    assert gone(newest_pid(paths, "trainer"))


def test_orphans_end_by_themselves_with_what_they_started(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="obey", ranks=2)
    started = waiting_pids(paths, 0) + waiting_pids(paths, 1)
    process.kill()
    wait_for(lambda: all(gone(pid) for pid in started), "the orphans to end")


def test_leftovers_of_a_killed_supervisor_are_ended_before_the_next_attempt(
    paths: RunPaths, supervise: Supervise
) -> None:
    first = supervise(worker="deaf", engines=1)
    left = waiting_pids(paths)
    first.kill()
    first.wait()
    assert not any(gone(pid) for pid in left)
    code, _ = end_of(supervise(worker="succeed"), paths)
    assert code == 0
    assert all(gone(pid) for pid in left)
    killed, finished = read_attempts(paths)
    assert (killed.ended, finished.reason) == (None, EndReason.FINISHED)


def test_what_a_dead_rank_had_started_is_ended_before_the_next_attempt(paths: RunPaths, supervise: Supervise) -> None:
    first = supervise(worker="deaf")
    rank, grandchild = waiting_pids(paths)
    first.kill()
    first.wait()
    os.kill(rank, signal.SIGKILL)
    wait_for(lambda: gone(rank), "the rank to die")
    assert not gone(grandchild)
    end_of(supervise(worker="succeed"), paths)
    assert gone(grandchild)
