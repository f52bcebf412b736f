from pathlib import Path

import pytest

from miles.config.schema import ReportStep, RunConfig, TinyTaskStep
from miles.runs.attempts import EndReason, begin_attempt, end_attempt
from miles.runs.claim import Claim
from miles.runs.directory import create_run
from miles.runs.paths import RunPaths
from miles.workflow.done import write_done
from miles.workflow.plan import plan_run
from miles.workflow.status import State, read_status, summarize_run

STEPS = {"prepare": TinyTaskStep(kind="tiny-task"), "report": ReportStep(kind="report", needs=["prepare"])}


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return create_run(_config(tmp_path))


def _config(directory: Path) -> RunConfig:
    return RunConfig(name="demo", runs_dir=str(directory), steps=STEPS)


def _finish(paths: RunPaths, name: str) -> None:
    attempt = begin_attempt(paths, name)
    planned = next(step for step in plan_run(_config(paths.root.parent), paths) if step.name == name)
    write_done(paths, name, planned.inputs, attempt=attempt, finished=100.0, seconds=5.0)
    end_attempt(paths, attempt, EndReason.FINISHED)


def _states(paths: RunPaths) -> tuple[State, list[State]]:
    status = read_status(paths)
    return status.state, [step.state for step in status.steps]


def test_new_run_is_pending(paths: RunPaths) -> None:
    assert _states(paths) == (State.PENDING, [State.PENDING, State.PENDING])


def test_running_step_has_a_holder_and_a_time(paths: RunPaths) -> None:
    with Claim.acquire(paths):
        begin_attempt(paths, "prepare")
        assert _states(paths) == (State.RUNNING, [State.RUNNING, State.PENDING])
        seconds = read_status(paths).steps[0].seconds
        assert seconds is not None
        assert seconds >= 0.0


def test_step_without_an_end_and_without_a_holder_was_killed(paths: RunPaths) -> None:
    begin_attempt(paths, "prepare")
    assert _states(paths) == (State.KILLED, [State.KILLED, State.PENDING])


@pytest.mark.parametrize(
    ("reason", "state"),
    [(EndReason.TRAINER_CRASH, State.FAILED), (EndReason.STOPPED, State.STOPPED), (EndReason.FAILED, State.FAILED)],
)
def test_ended_step_says_why(paths: RunPaths, reason: EndReason, state: State) -> None:
    _finish(paths, "prepare")
    end_attempt(paths, begin_attempt(paths, "report"), reason, exit_code=6, detail="trainer 0 died")
    assert _states(paths) == (state, [State.DONE, state])
    failed = read_status(paths).failed_step
    assert failed is not None
    assert (failed.name, failed.detail, failed.reason) == ("report", "trainer 0 died", reason)


def test_finished_run_is_done(paths: RunPaths) -> None:
    _finish(paths, "prepare")
    _finish(paths, "report")
    assert _states(paths) == (State.DONE, [State.DONE, State.DONE])
    summary = summarize_run(paths)
    assert (summary.done, summary.steps, summary.seconds) == (2, 2, 10.0)


def test_damaged_run_is_listed_with_its_problem(paths: RunPaths) -> None:
    paths.config.write_text("name = ")
    summary = summarize_run(paths)
    assert summary.state is None
    assert "run.toml" in summary.problem
