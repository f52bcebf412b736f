"""Two nodes of one job, started by hand as srun would: real processes, with stand-ins for workers and engines."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles.cluster.launch import Launch, Over, read_launch, read_report, write_launch
from miles.errors import DataError, Interrupted, RunError
from miles.runs.attempts import EndReason, begin_attempt, end_attempt, read_attempts
from miles.runs.claim import current_holder
from miles.runs.endpoints import read_endpoints
from miles.runs.files import append_json, read_json_lines
from miles.runs.paths import RunPaths
from miles.workflow.done import read_done
from tests.cluster.conftest import REPOSITORY
from tests.cluster.helpers import STEP, gone, wait_for, waiting_pids

JOB = 4711
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def node(paths: RunPaths) -> Iterator[Start]:
    """Start a node of the job; whatever it leaves running is killed after the test."""
    started = []

    def start(
        index: int, *, nodes: int = 2, restart: int = 0, worker: str = "succeed", engines: int = 0, **more: object
    ) -> subprocess.Popen[str]:
        silence = more.pop("silence", 20.0)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MILES"))}
        environment |= {
            "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent / 'standins'}",
            "STANDIN_WORKER": worker,
            "STANDIN_ENGINE": "serve",
            "SLURM_JOB_ID": str(JOB),
            "SLURM_NODEID": str(index),
            "SLURMD_NODENAME": f"n{index + 1}",
            "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
            "MILES_HOSTS": ",".join(f"n{number + 1}" for number in range(nodes)),
            "MILES_LIVE_JOBS": str(JOB),
        }
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        environment |= {name: str(value) for name, value in more.items()}
        command = [sys.executable, "-m", "standin_node", str(paths.root), STEP, "1", str(engines), str(silence)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    for record in _processes(paths):
        if psutil.pid_exists(record["pid"]):
            os.killpg(record["pid"], 9)


def _processes(paths: RunPaths) -> list[dict[str, Any]]:
    files = sorted(paths.all_logs.glob("attempt-*/processes*.jsonl"))
    return [record for file in files for record in read_json_lines(file)]


def _ends(*nodes: subprocess.Popen[str], paths: RunPaths) -> list[int]:
    codes = [node.wait(timeout=90) for node in nodes]
    assert [record for record in _processes(paths) if not gone(record["pid"])] == []
    return codes


def test_two_nodes_run_one_step_together(paths: RunPaths, node: Start) -> None:
    codes = _ends(node(0, engines=2), node(1, engines=2), paths=paths)
    assert codes == [0, 0]
    assert read_done(paths, STEP) is not None
    first, second = (json.loads((paths.step(STEP) / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert (first["RANK"], first["LOCAL_RANK"], first["WORLD_SIZE"]) == ("0", "0", "2")
    assert (second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("1", "0", "2")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["MILES_CLAIM"] == second["MILES_CLAIM"]
    engines = read_endpoints(paths.engines(1))
    assert [(engine.index, engine.start, engine.ready) for engine in engines] == [(i, 1, True) for i in range(4)]
    assert len({engine.url for engine in engines}) == 4
    names = {path.name for path in paths.logs(1).glob("*.log")}
    assert {"trainer-n1-0.log", "trainer-n2-1.log", "engine-n1-1.log", "engine-n2-2.log"} <= names
    (attempt,) = read_attempts(paths)
    assert (attempt.reason, attempt.host) == (EndReason.FINISHED, "n1")
    assert attempt.place is not None
    assert (attempt.place.job, attempt.place.restart, list(attempt.place.nodes)) == (JOB, 0, ["n1", "n2"])
    assert attempt.place.ranks == 2
    assert read_launch(paths.allocation(JOB, 0)) == Over(0)
    assert current_holder(paths) is None


def test_finished_step_is_not_run_again(paths: RunPaths, node: Start) -> None:
    assert _ends(node(0), node(1), paths=paths) == [0, 0]
    assert _ends(node(0, restart=1), node(1, restart=1), paths=paths) == [0, 0]
    assert len(read_attempts(paths)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signal_to_all_nodes_is_a_preemption(paths: RunPaths, node: Start, number: signal.Signals) -> None:
    nodes = [node(0, worker="obey", engines=1), node(1, worker="obey", engines=1)]
    started = waiting_pids(paths, 0) + waiting_pids(paths, 1)
    for _ in range(2):  # signals arrive twice
        for process in nodes:
            process.send_signal(number)
        time.sleep(0.7)
    assert _ends(*nodes, paths=paths) == [Interrupted.exit_code] * 2
    (attempt,) = read_attempts(paths)
    assert (attempt.reason, attempt.exit_code) == (EndReason.PREEMPTED, 75)
    assert attempt.detail == f"step '{STEP}' had to make way for another job"
    wait_for(lambda: all(gone(pid) for pid in started), "what the ranks had started to go")


@pytest.mark.parametrize(
    ("stop", "end", "reason"),
    [(True, 60.0, EndReason.STOPPED), (False, 200.0, EndReason.TIME_LIMIT), (False, 9000.0, EndReason.PREEMPTED)],
)
def test_signal_is_told_by_the_request_and_the_time(
    paths: RunPaths, node: Start, stop: bool, end: float, reason: EndReason
) -> None:
    job_end = time.time() + end
    nodes = [node(index, worker="obey", MILES_JOB_END=job_end) for index in range(2)]
    waiting_pids(paths, 0), waiting_pids(paths, 1)
    if stop:
        paths.stop_request.write_text("{}")
    for process in nodes:
        process.send_signal(signal.SIGUSR2)
    assert _ends(*nodes, paths=paths) == [75, 75]
    assert [attempt.reason for attempt in read_attempts(paths)] == [reason]


def test_failing_rank_of_another_node_is_named(paths: RunPaths, node: Start) -> None:
    nodes = [node(0, worker="obey"), node(1, worker="fail")]
    assert _ends(*nodes, paths=paths) == [Interrupted.exit_code] * 2, "it may have been the node, or chance"
    (attempt,) = read_attempts(paths)
    assert (attempt.reason, attempt.exit_code) == (EndReason.TRAINER_CRASH, 75)
    assert "trainer 1" in attempt.detail
    assert attempt.detail.endswith("the last word of rank 1")


def test_rank_that_says_what_is_wrong_is_not_started_again(paths: RunPaths, node: Start) -> None:
    nodes = [node(index, worker="explain") for index in range(2)]
    assert _ends(*nodes, paths=paths) == [DataError.exit_code] * 2
    (attempt,) = read_attempts(paths)
    assert (attempt.reason, attempt.exit_code) == (EndReason.FAILED, DataError.exit_code)


def test_killed_node_is_lost_and_the_run_goes_on(paths: RunPaths, node: Start) -> None:
    nodes = [node(0, worker="obey", silence=3.0), node(1, worker="obey", silence=3.0)]
    waiting_pids(paths, 0), waiting_pids(paths, 1)
    nodes[1].kill()
    assert _ends(*nodes, paths=paths) == [Interrupted.exit_code, -signal.SIGKILL]
    (attempt,) = read_attempts(paths)
    assert (attempt.reason, attempt.exit_code) == (EndReason.NODE_FAILURE, 75)
    assert attempt.detail == "node n2 is lost: no report for 3 s"
    again = [node(0, restart=1), node(1, restart=1)]
    assert _ends(*again, paths=paths) == [0, 0]


def test_killed_head_ends_the_others_and_the_next_attempt_closes_the_ledger(paths: RunPaths, node: Start) -> None:
    nodes = [node(0, worker="obey", silence=3.0), node(1, worker="obey", silence=3.0)]
    waiting_pids(paths, 0), waiting_pids(paths, 1)
    paths.slurm_log(STEP, JOB).write_text(
        "slurmstepd: error: *** JOB 4711 ON n1 CANCELLED AT 2026-01-02T03:04:05 DUE TO PREEMPTION ***\n"
    )
    nodes[0].kill()
    assert _ends(*nodes, paths=paths) == [-signal.SIGKILL, Interrupted.exit_code]
    assert read_attempts(paths)[0].ended is None
    assert _ends(node(0, restart=1), node(1, restart=1), paths=paths) == [0, 0]
    killed, finished = read_attempts(paths)
    assert (killed.reason, killed.exit_code, finished.reason) == (EndReason.PREEMPTED, None, EndReason.FINISHED)
    assert killed.ended is not None
    assert killed.started <= killed.ended <= finished.started


def test_later_run_of_the_job_takes_the_run_from_a_head_that_lives_on(paths: RunPaths, node: Start) -> None:
    old = [node(0, worker="deaf"), node(1, worker="deaf")]
    waiting_pids(paths, 0), waiting_pids(paths, 1)
    new = [node(0, restart=1), node(1, restart=1)]
    assert [process.wait(timeout=60) for process in new] == [0, 0]
    assert _ends(*old, paths=paths) == [RunError.exit_code] * 2
    taken, finished = read_attempts(paths)
    assert finished.reason is EndReason.FINISHED
    assert taken.reason is EndReason.KILLED, "the old head writes nothing any more"


def test_other_job_is_refused_while_the_holder_lives_and_not_afterwards(paths: RunPaths, node: Start) -> None:
    first = node(0, nodes=1, worker="obey")
    waiting_pids(paths, 0)
    other = node(0, nodes=1, SLURM_JOB_ID=4712, MILES_LIVE_JOBS=f"{JOB},4712")
    assert other.wait(timeout=60) == RunError.exit_code
    assert other.stderr is not None
    assert f"is in use by process {first.pid} on n1 in job {JOB}" in other.stderr.read()
    assert node(0, nodes=1, SLURM_JOB_ID=4712, MILES_LIVE_JOBS="4712").wait(timeout=60) == 0
    assert _ends(first, paths=paths) == [RunError.exit_code]


def test_node_with_other_code_or_clock_is_refused(paths: RunPaths, node: Start) -> None:
    attempt = begin_attempt(paths, STEP)
    launch = Launch(STEP, attempt, 1, ("n1", "n2"), "127.0.0.1", 20000, "0.0+other", time.time())
    write_launch(paths.allocation(JOB, 0), launch)
    process = node(1)
    assert process.wait(timeout=60) == RunError.exit_code
    report = read_report(paths.nodes(attempt), 1)
    assert report is not None
    assert report.error is not None
    assert report.gone
    assert f"node n2 runs Miles {report.code}, the head n1 runs 0.0+other" in report.error.message
    write_launch(paths.allocation(JOB, 0), replace(launch, code=report.code, time=time.time() + 100))
    assert node(1).wait(timeout=60) == RunError.exit_code
    report = read_report(paths.nodes(attempt), 1)
    assert report is not None
    assert report.error is not None
    assert "behind that of n1 (at most 30 s)" in report.error.message


def test_attempts_without_progress_are_not_repeated_for_ever(paths: RunPaths, node: Start) -> None:
    for number in range(2):
        nodes = [node(0, worker="obey", restart=number), node(1, worker="fail", restart=number)]
        assert [process.wait(timeout=60) for process in nodes] == [Interrupted.exit_code] * 2
    third = node(0, nodes=1, restart=2)
    assert third.wait(timeout=60) == RunError.exit_code
    assert third.stderr is not None
    assert "the last 2 attempts of step 'prepare' made no progress" in third.stderr.read()
    assert len(read_attempts(paths)) == 2
    append_json(paths.jobs, {"step": STEP, "job": JOB, "time": time.time()})
    assert node(0, nodes=1, restart=3).wait(timeout=60) == 0, "a person has submitted it again"


def test_ranks_meet_elsewhere_when_their_port_is_taken(paths: RunPaths, node: Start) -> None:
    assert _ends(node(0, worker="robbed"), node(1, worker="robbed"), paths=paths) == [0, 0]
    ranks = [json.loads((paths.step(STEP) / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"] != (paths.root / "robbed").read_text()
    assert [attempt.reason for attempt in read_attempts(paths)] == [EndReason.FINISHED]


def test_other_number_of_nodes_is_noted(paths: RunPaths, node: Start) -> None:
    nodes = [node(0, worker="obey"), node(1, worker="obey")]
    waiting_pids(paths, 0), waiting_pids(paths, 1)
    for process in nodes:
        process.terminate()
    assert _ends(*nodes, paths=paths) == [75, 75]
    assert _ends(node(0, nodes=1, restart=1), paths=paths) == [0]
    assert "now with 1 rank on 1 node, before with 2 ranks on 2" in read_attempts(paths)[1].note


def test_attempts_outside_of_jobs_are_left_alone(paths: RunPaths, node: Start) -> None:
    begin_attempt(paths, STEP)
    end_attempt(paths, begin_attempt(paths, STEP), EndReason.STOPPED)
    assert _ends(node(0, nodes=1), paths=paths) == [0]
    assert [attempt.reason for attempt in read_attempts(paths)] == [None, EndReason.STOPPED, EndReason.FINISHED]
