"""Supervision of real processes. The workers and engines are stand-ins that misbehave on request."""

import json
import os
import signal
from pathlib import Path

from miles.cluster.ports import is_free
from miles.errors import DataError, TrainerError
from miles.runs.attempts import EndReason
from miles.runs.endpoints import read_endpoints
from miles.runs.failures import read_failure
from miles.runs.metrics import MetricsWriter, read_metrics
from miles.runs.paths import RunPaths
from miles.runs.samples import sampled_steps, write_samples
from miles.workflow.done import read_done
from tests.cluster.helpers import STEP, Supervise, end_of, gone, newest_pid, recorded_processes, wait_for, waiting_pids


def test_step_runs_on_ranks_with_engines_and_is_recorded_as_done(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = end_of(supervise(ranks=2, engines=2), paths)
    assert (code, attempt.reason) == (0, EndReason.FINISHED)
    done = read_done(paths, STEP)
    assert done is not None
    assert set(done.outputs) == {"rank-0.json", "rank-1.json"}
    ranks = [json.loads((paths.step(STEP) / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) for env in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert {(env["MILES_ATTEMPT"], env["MILES_CLAIM"]) for env in ranks} == {("1", "1")}
    assert "MILES_DEADLINE" not in ranks[0]
    assert float(ranks[0]["MILES_GRACE_SECONDS"]) > 0
    assert {env["MILES_ENGINES_FILE"] for env in ranks} == {str(paths.engines(1))}
    engines = read_endpoints(paths.engines(1))
    assert [(engine.index, engine.start, engine.ready) for engine in engines] == [(0, 1, True), (1, 1, True)]
    urls = [engine.url for engine in engines]
    assert len(set(urls)) == 2
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
    end_of(process, paths)


def test_killed_rank_ends_all_others(paths: RunPaths, supervise: Supervise) -> None:
    process = supervise(worker="obey", ranks=2, engines=1)
    started = waiting_pids(paths, 0) + waiting_pids(paths, 1)
    victim = newest_pid(paths, "trainer")
    os.kill(victim, signal.SIGKILL)
    code, attempt = end_of(process, paths)
    assert (code, attempt.reason) == (TrainerError.exit_code, EndReason.TRAINER_CRASH)
    assert f"trainer 0 (process {victim}) was killed by SIGKILL" in attempt.detail
    failure = read_failure(paths.root / "failure.json")
    assert failure is not None
    assert f"`miles resume {paths.root}` continues the run" in str(failure.fix)
    wait_for(lambda: all(gone(pid) for pid in started), "what the ranks had started to go")


def test_failing_rank_is_named_with_the_end_of_its_log(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = end_of(supervise(worker="fail", ranks=2), paths)
    assert (code, attempt.reason, attempt.exit_code) == (6, EndReason.TRAINER_CRASH, 6)
    assert "trainer 1" in attempt.detail
    assert "exit code 7" in attempt.detail
    assert attempt.detail.endswith("the last word of rank 1")


def test_error_that_a_rank_explains_is_the_error_of_the_step(paths: RunPaths, supervise: Supervise) -> None:
    code, attempt = end_of(supervise(worker="explain", ranks=2), paths)
    assert (code, attempt.reason) == (DataError.exit_code, EndReason.FAILED)
    failure = read_failure(paths.root / "failure.json")
    assert isinstance(failure, DataError)
    assert (failure.message, failure.fix) == ("prompt 17 is longer than the context", "set data.too_long")


def test_interrupted_step_starts_from_its_beginning_and_says_so(paths: RunPaths, supervise: Supervise) -> None:
    MetricsWriter(paths).write("other", 1, {"loss": 2.0})
    MetricsWriter(paths).write(STEP, 1, {"loss": 2.0})
    MetricsWriter(paths).write(STEP, 2, {"loss": 2.0})
    write_samples(paths, STEP, 2, [])
    paths.step(STEP).mkdir()
    (paths.step(STEP) / "half-written").touch()
    code, attempt = end_of(supervise(), paths)
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
    _, attempt = end_of(first, paths)
    assert attempt.number == 1
