"""Real engine processes that do not start, die and hang. They are stand-ins that misbehave on request."""

import os
import signal
import time
from pathlib import Path

import psutil

from miles.cluster.engines import PORT_TRIES
from miles.errors import EngineError
from miles.runs.attempts import EndReason
from miles.runs.endpoints import Endpoint
from miles.runs.failures import read_failure
from miles.runs.paths import RunPaths
from miles.workflow.done import read_done
from tests.cluster.helpers import STEP, Supervise, end_of, engines_when, newest_pid, wait_for, waiting_pids


def _all_ready(engines: list[Endpoint]) -> bool:
    return all(engine.ready for engine in engines)


def _log(paths: RunPaths) -> str:
    (file,) = paths.latest_logs.glob("engine-*-0.log")
    return file.read_text()


def test_ranks_start_before_the_engines_answer(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(engine="patient", engines=2)
    wait_for(lambda: (paths.root / "began-0").exists(), "the rank to begin")
    assert not any(engine.ready for engine in engines_when(paths, lambda engines: True, "the file"))
    (paths.root / "go").touch()
    code, attempt = end_of(process, paths)
    assert (code, attempt.reason) == (0, EndReason.FINISHED)


def test_engine_that_cannot_start_ends_the_step_with_the_end_of_its_log(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = end_of(supervise(engine="one-crashes", engines=2), paths)
    assert (code, attempt.reason) == (EngineError.exit_code, EndReason.ENGINE_START)
    failure = read_failure(paths.root / "failure.json")
    assert isinstance(failure, EngineError)
    assert "engine 1" in failure.message
    assert "exit code 3" in failure.message
    assert failure.message.endswith("engine standing in\ncannot load the weights")
    assert read_done(paths, STEP) is None


def test_engine_that_never_answers_is_given_up_after_its_timeout(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = end_of(supervise(engine="silent", engines=1, startup_timeout=2.0), paths)
    assert (code, attempt.reason) == (EngineError.exit_code, EndReason.ENGINE_START)
    assert "engine 0 did not answer within 2 s" in attempt.detail


def test_engine_whose_port_was_taken_starts_on_another(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = end_of(supervise(engine="robbed", engines=1, max_restarts=0), paths)
    assert (code, attempt.reason) == (0, EndReason.FINISHED)
    (engine,) = engines_when(paths, _all_ready, "the engine")
    assert engine.start == 2 <= PORT_TRIES
    assert engine.url.rpartition(":")[2] != (paths.root / "robbed").read_text()


def test_killed_engine_is_started_again_elsewhere(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="obey", engines=2)
    waiting_pids(paths)
    before = engines_when(paths, _all_ready, "both engines")
    victim = newest_pid(paths, "engine")
    os.kill(victim, signal.SIGKILL)
    after = engines_when(paths, lambda engines: engines[0].start == 2 and _all_ready(engines), "the second start")
    assert after[0].url != before[0].url
    assert after[1] == before[1], "the other engine is left alone"
    assert newest_pid(paths, "engine") != victim
    assert "---- engine 0 is started again ----" in _log(paths)
    process.terminate()
    _, attempt = end_of(process, paths)
    assert attempt.reason is EndReason.STOPPED
    assert process.stderr is not None
    told = process.stderr.read()
    assert "engine 0 starts again, for the 1. of at most 3 times" in told
    assert f"engine 0 (process {victim}) was killed by SIGKILL" in told
    assert "engine standing in" in told, "the end of its log"


def test_engine_that_hangs_is_killed_and_started_again(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="obey", engines=1, hang_timeout=2.0)
    waiting_pids(paths)
    engines_when(paths, _all_ready, "the engine")
    victim = newest_pid(paths, "engine")
    os.kill(victim, signal.SIGSTOP)
    engines_when(paths, lambda engines: engines[0].start > 1 and engines[0].ready, "the second start")
    assert not psutil.pid_exists(victim)
    process.terminate()
    end_of(process, paths)
    assert process.stderr is not None
    assert f"engine 0 (process {victim}) has not answered for 2 s" in process.stderr.read()


def test_supervisor_that_was_suspended_does_not_blame_its_engines(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="obey", engines=1, hang_timeout=4.0)
    waiting_pids(paths)
    before = engines_when(paths, _all_ready, "the engine")
    everybody = [process.pid, newest_pid(paths, "engine")]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    for pid in everybody:
        os.kill(pid, signal.SIGCONT)
    time.sleep(1)
    process.terminate()
    _, attempt = end_of(process, paths)
    assert attempt.reason is EndReason.STOPPED
    assert engines_when(paths, _all_ready, "the engine") == before


def test_engine_that_dies_too_often_ends_the_attempt(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="obey", engine="fragile", engines=1, max_restarts=2)
    waiting_pids(paths)
    engines_when(paths, _all_ready, "the engine")
    os.kill(newest_pid(paths, "engine"), signal.SIGKILL)
    code, attempt = end_of(process, paths)
    assert (code, attempt.reason) == (EngineError.exit_code, EndReason.ENGINE_CRASH)
    assert "engine 0 failed once more after 2 restarts in this attempt (engine.max_restarts = 2)" in attempt.detail
    assert attempt.detail.endswith("engine standing in\ncannot load the weights again"), "of the last start alone"
    assert (paths.root / "starts-0").read_text() == "+++"
    failure = read_failure(paths.root / "failure.json")
    assert failure is not None
    assert f"`miles resume {paths.root}` continues the run" in str(failure.fix)


def test_engines_without_restarts_end_the_attempt_at_once(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="obey", engines=1, max_restarts=0)
    started = waiting_pids(paths)
    engines_when(paths, _all_ready, "the engine")
    victim = newest_pid(paths, "engine")
    os.kill(victim, signal.SIGKILL)
    code, attempt = end_of(process, paths)
    assert (code, attempt.reason) == (EngineError.exit_code, EndReason.ENGINE_CRASH)
    assert f"engine 0 (process {victim}) was killed by SIGKILL" in attempt.detail
    assert all(not Path(f"/proc/{pid}").exists() for pid in started[:1])
