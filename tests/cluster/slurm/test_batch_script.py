"""What the batch script does: what it tells the nodes, how it hands signals on, when it goes back into the queue.

Slurm's programs are stand-ins here (`standins/`); `tests/slurm/test_batch_job.py` has the same on a real cluster.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from scripts import STANDINS, run, spec, start

DUMP = "import json, os, sys; json.dump(dict(os.environ), open(os.environ['RECORD'] + '/environment', 'w'))"
LISTENS = """
import os, signal, sys, time
heard = []
def hear(number, frame):
    heard.append(number)
    with open(os.environ["RECORD"] + "/heard", "a") as file:
        print(number, file=file)
signal.signal(signal.SIGUSR2, hear)
open(os.environ["RECORD"] + "/listens", "w")
while len(heard) < int(sys.argv[1]):
    time.sleep(0.01)
sys.exit(75)
"""


def ends(code: int) -> tuple[str, ...]:
    return ("bash", "-c", f"exit {code}")


def listens(times: int = 1) -> tuple[str, ...]:
    return (sys.executable, "-c", LISTENS, str(times))


def environment_of_a_node(tmp_path: Path, **given: str) -> dict[str, str]:
    code, output, script = run(spec(tmp_path, command=(sys.executable, "-c", DUMP)), tmp_path, **given)
    assert code == 0, output
    return json.loads((script.record / "environment").read_text())


def test_nodes_are_told_what_they_cannot_ask(tmp_path: Path) -> None:
    before = int(time.time())
    told = environment_of_a_node(tmp_path)
    assert told["MILES_HOSTS"] == "n1,n2"
    assert told["MILES_GRACE"] == "12"
    assert told["MILES_LIVE_JOBS"] == "7,9"  # a job that waits has no process
    assert 0 <= int(told["MILES_JOB_END"]) - before - (86400 + 2 * 3600 + 3 * 60 + 4) <= 10
    assert told["PYTHONPATH"] == "/shared/miles"
    assert "SLURM_EXPORT_ENV" not in told


@pytest.mark.parametrize(("left", "seconds"), [("0:59", 59), ("08:09", 489), ("1:00:00", 3600), ("UNLIMITED", None)])
def test_the_end_of_the_job_in_every_form(tmp_path: Path, left: str, seconds: int | None) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "time-left").write_text(left)
    before = int(time.time())
    told = environment_of_a_node(tmp_path)
    if seconds is None:
        assert "MILES_JOB_END" not in told
    else:
        assert 0 <= int(told["MILES_JOB_END"]) - before - seconds <= 10


def test_newer_versions_tell_the_end_themselves(tmp_path: Path) -> None:
    assert environment_of_a_node(tmp_path, SLURM_JOB_END_TIME="1234")["MILES_JOB_END"] == "1234"


def test_without_the_tools_of_slurm_the_nodes_start_all_the_same(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").symlink_to(STANDINS / "srun")
    for name in ("bash", "cat", "date", "id", "mkdir", "touch"):
        (tools / name).symlink_to(shutil.which(name) or name)
    told = environment_of_a_node(tmp_path, PATH=str(tools))
    assert not {"MILES_HOSTS", "MILES_GRACE", "MILES_LIVE_JOBS", "MILES_JOB_END"} & set(told)


def test_a_node_has_a_directory_of_its_own_for_sockets_and_caches(tmp_path: Path) -> None:
    told = environment_of_a_node(tmp_path, TRITON_CACHE_DIR="/mine")
    scratch = tmp_path / "miles-user-7"
    assert told["TMPDIR"] == told["MILES_SCRATCH"] == str(scratch)
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert told["TRITON_CACHE_DIR"] == "/mine"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "FLASHINFER_WORKSPACE_BASE", "DG_JIT_CACHE_DIR"):
        assert Path(told[name]).parent == scratch


def test_somebody_elses_directory_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "miles-user-7").symlink_to(tmp_path / "other")
    code, output, _ = run(spec(tmp_path, command=ends(0)), tmp_path)
    assert code == 73
    assert "miles-user-7 cannot be made, or is not your own" in output


@pytest.mark.parametrize("code", [0, 1, 2, 127, 137, 139])
def test_an_end_that_no_signal_explains_is_the_jobs(tmp_path: Path, code: int) -> None:
    ended, output, script = run(spec(tmp_path, command=ends(code)), tmp_path)
    assert (ended, script.lines("requeues")) == (code, []), output


def test_an_element_puts_back_itself_and_not_its_array(tmp_path: Path) -> None:
    # The last element has the number of the whole array: `scontrol requeue 7` would start all of it again.
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    _, output, script = run(spec(tmp_path, command=ends(75)), tmp_path, **array)
    assert script.lines("requeues") == ["7_3"], output


def test_work_that_is_not_done_goes_back_into_the_queue(tmp_path: Path) -> None:
    ended, output, script = run(spec(tmp_path, command=ends(75)), tmp_path)
    assert script.lines("requeues") == ["7"], output
    assert ended == -signal.SIGTERM  # the requeue ended it


@pytest.mark.parametrize(
    ("code", "word", "ended"),
    [(137, '{"exit_code": 4}', 4), (143, '{"exit_code": 0}', 0), (137, '{"step": "grpo"}', None)],
)
def test_the_word_of_the_head_counts_and_a_head_that_was_killed_in_an_attempt_comes_back(
    tmp_path: Path, code: int, word: str, ended: int | None
) -> None:
    (tmp_path / "allocations").mkdir()
    (tmp_path / "allocations" / "7-0.json").write_text(word + "\n")
    job_code, output, script = run(spec(tmp_path, command=ends(code)), tmp_path)
    assert script.lines("requeues") == (["7"] if ended is None else []), output
    assert ended in (None, job_code)


@pytest.mark.parametrize("code", [138, 140, 143])
def test_supervisors_that_were_ended_before_they_could_listen_have_not_done_the_work(tmp_path: Path, code: int) -> None:
    _, output, script = run(spec(tmp_path, command=ends(code)), tmp_path)
    assert script.lines("requeues") == ["7"], output


def test_a_job_that_slurm_has_put_back_a_moment_before_is_not_said_to_be_lost(tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "slurm-is-faster").touch()
    ended, output, script = run(spec(tmp_path, command=ends(75)), tmp_path)
    assert (ended, script.lines("requeues")) == (75, ["7"])
    assert "back into the queue already" in output
    assert "cannot be requeued" not in output


def test_where_requeueing_is_forbidden_the_job_ends_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "no-requeue").touch()
    ended, output, script = run(spec(tmp_path, command=ends(75)), tmp_path)
    assert (ended, script.lines("requeues")) == (75, ["7"])
    assert 'the job cannot be requeued; miles resume continues the run, and slurm.restart = "chain"' in output


@pytest.mark.parametrize("restart", ["chain", "none"])
def test_only_a_run_that_wants_it_is_requeued(tmp_path: Path, restart: str) -> None:
    ended, output, script = run(spec(tmp_path, command=ends(75), restart=restart), tmp_path)
    assert (ended, script.lines("requeues")) == (75, []), output


def test_a_run_that_was_asked_to_stop_stays_stopped(tmp_path: Path) -> None:
    (tmp_path / "stop.json").write_text("{}")
    ended, output, script = run(spec(tmp_path, command=ends(75)), tmp_path)
    assert (ended, script.lines("requeues")) == (75, [])
    assert "stopped on request" in output


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_was_cancelled_does_not_come_back(tmp_path: Path, state: str) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "state").write_text(state)
    ended, output, script = run(spec(tmp_path, command=ends(75)), tmp_path)
    assert (ended, script.lines("requeues")) == (75, [])
    assert "Slurm is ending this job already" in output


def test_an_older_run_of_the_job_leaves_the_newer_one_alone(tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "restarts").write_text("2")
    ended, output, script = run(spec(tmp_path, command=ends(75)), tmp_path, SLURM_RESTART_COUNT="1")
    assert (ended, script.lines("requeues")) == (75, [])
    assert "back into the queue already" in output


def test_a_job_that_its_time_limit_ends_comes_back(tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "state").write_text("COMPLETING")
    ended = str(int(time.time()) - 1)
    _, output, script = run(spec(tmp_path, command=ends(75)), tmp_path, SLURM_JOB_END_TIME=ended)
    assert script.lines("requeues") == ["7"], output


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGUSR2"])
def test_each_signal_reaches_the_supervisors_as_usr2_and_never_as_one_that_kills(tmp_path: Path, name: str) -> None:
    script = start(spec(tmp_path, command=listens()), tmp_path)
    script.wait_for("listens")
    os.kill(script.process.pid, signal.Signals[name])
    _, output = script.end()
    assert script.lines("signals") == ["USR2"], output
    assert script.lines("heard") == [str(int(signal.SIGUSR2))]
    assert script.lines("requeues") == ["7"]


def test_a_signal_that_arrives_twice_changes_nothing_but_is_handed_on(tmp_path: Path) -> None:
    script = start(spec(tmp_path, command=listens(2)), tmp_path)
    script.wait_for("listens")
    os.kill(script.process.pid, signal.SIGUSR1)
    script.wait_for("heard")
    os.kill(script.process.pid, signal.SIGTERM)
    _, output = script.end()
    assert script.lines("signals") == ["USR2", "USR2"], output
    assert script.lines("requeues") == ["7"]


def test_a_signal_before_srun_begins_nothing(tmp_path: Path) -> None:
    setup = 'touch "$RECORD/setup"; while [ ! -e "$RECORD/go" ]; do sleep 0.01; done'
    script = start(spec(tmp_path, command=ends(0), setup=[setup]), tmp_path)
    script.wait_for("setup")
    os.kill(script.process.pid, signal.SIGUSR1)
    (script.record / "go").touch()
    _, output = script.end()
    assert not (script.record / "srun").exists(), output
    assert script.lines("requeues") == ["7"]


def test_setup_runs_before_everything_else_and_may_use_variables_that_are_not_set(tmp_path: Path) -> None:
    job = spec(tmp_path, command=(sys.executable, "-c", DUMP), setup=["export FROM_SETUP=${NOWHERE}x"])
    code, output, script = run(job, tmp_path)
    assert code == 0, output
    assert json.loads((script.record / "environment").read_text())["FROM_SETUP"] == "x"


def test_srun_starts_one_task_on_each_node_and_ends_no_other_node_itself(tmp_path: Path) -> None:
    _, _, script = run(spec(tmp_path, command=ends(0)), tmp_path, SLURM_CPUS_PER_TASK="16")
    arguments = script.srun_arguments()
    assert arguments[: arguments.index("bash")] == [
        *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--cpu-bind=none"),
        *("--export=ALL", "--kill-on-bad-exit=0", "--wait=0"),
    ]
