from pathlib import Path

import pytest

from miles.cluster.endings import EndedEarly, end_reason, may_pass, read_output, slurm_word, why_signalled
from miles.cluster.launch import Failure, cause
from miles.errors import EngineError, EngineLost, Interrupted, MilesError, RankLost, RunError, TrainerError
from miles.runs.attempts import EndReason


@pytest.mark.parametrize(
    ("error", "came_up", "reason"),
    [
        (EndedEarly("x", EndReason.NODE_FAILURE), True, EndReason.NODE_FAILURE),
        (Interrupted("x"), True, EndReason.STOPPED),
        (EngineError("x"), False, EndReason.ENGINE_START),
        (EngineError("x"), True, EndReason.ENGINE_CRASH),
        (TrainerError("x"), True, EndReason.TRAINER_CRASH),
        (
            RankLost("x was killed by SIGKILL (the system does that when memory runs out)"),
            True,
            EndReason.TRAINER_CRASH,
        ),
        (RankLost("x\ntorch.OutOfMemoryError: CUDA out of memory."), True, EndReason.OUT_OF_MEMORY),
        (RankLost("x\nmemory allocation of 16 bytes failed"), True, EndReason.OUT_OF_MEMORY),
        (EngineLost("x\nMemoryError"), False, EndReason.OUT_OF_MEMORY),
        (TrainerError("the message speaks of a MemoryError"), True, EndReason.TRAINER_CRASH),
        (RunError("x"), True, EndReason.FAILED),
    ],
)
def test_word_for_an_error(error: MilesError, came_up: bool, reason: EndReason) -> None:
    assert end_reason(error, engines_came_up=came_up) is reason


@pytest.mark.parametrize(
    ("error", "reason", "passes"),
    [
        (RankLost("x"), EndReason.TRAINER_CRASH, True),
        (RankLost("x"), EndReason.OUT_OF_MEMORY, True),
        (TrainerError("the gradient's norm is nan"), EndReason.TRAINER_CRASH, False),
        (TrainerError("x"), EndReason.NODE_FAILURE, True),
        (EngineLost("x"), EndReason.ENGINE_CRASH, True),
        (EngineLost("x"), EndReason.ENGINE_START, False),
        (EngineError("x refused weights"), EndReason.ENGINE_CRASH, False),
        (RunError("x"), EndReason.FAILED, False),
    ],
)
def test_which_ends_another_attempt_may_get_past(error: MilesError, reason: EndReason, passes: bool) -> None:
    assert may_pass(error, reason) is passes


@pytest.mark.parametrize(
    ("stop", "warned", "end", "reason"),
    [
        (True, False, None, EndReason.STOPPED),
        (True, True, 1010.0, EndReason.STOPPED),
        (False, True, None, EndReason.PREEMPTED),
        (False, True, 1000.0 + 300 + 91, EndReason.PREEMPTED),
        (False, True, 1000.0 + 300 + 60, EndReason.TIME_LIMIT),
        (False, True, 900.0, EndReason.TIME_LIMIT),
        (False, False, 1000.0 + 60, EndReason.PREEMPTED),
        (False, False, 1000.0, EndReason.TIME_LIMIT),
    ],
)
def test_why_a_signal_came(stop: bool, warned: bool, end: float | None, reason: EndReason) -> None:
    assert why_signalled(stop_requested=stop, warned=warned, end=end, now=1000.0, lead=300.0) is reason


STEP = "slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-01-02T03:04:05 "
JOB = "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-01-02T03:04:05 "
LATER_STEP = "[2026-01-02T03:04:05.019] error: *** STEP 12.0 ON n1 CANCELLED AT 2026-01-02T03:04:05 DUE "
LATER_JOB = "[2026-01-02T03:04:05.035] error: *** JOB 12 ON n1 CANCELLED AT 2026-01-02T03:04:05 DUE "


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", None),
        ("2026-01-02 INFO step grpo: done", None),
        (f"{JOB}DUE TO PREEMPTION ***\n{STEP}DUE TO PREEMPTION ***", EndReason.PREEMPTED),
        (f"{STEP}***\n{JOB}DUE TO PREEMPTION ***", EndReason.PREEMPTED),
        (f"{JOB}DUE TO TIME LIMIT ***", EndReason.TIME_LIMIT),
        (f"{JOB}DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", EndReason.NODE_FAILURE),
        (f"srun: error: Node failure on n2\n{STEP}***", EndReason.NODE_FAILURE),
        (f"{JOB}DUE TO JOB REQUEUE ***", EndReason.REQUEUED),
        (f"{STEP}***", None),
        (f"{JOB}***", EndReason.CANCELLED),
        (f"{JOB}", EndReason.CANCELLED),
        (f"{LATER_STEP}to SIGNAL Terminated ***\n{LATER_JOB}TO PREEMPTION ***", EndReason.PREEMPTED),
        (f"{LATER_STEP}to SIGNAL Terminated ***", None),
        (f"{LATER_JOB}to SIGNAL Terminated ***", EndReason.CANCELLED),
        (f"{LATER_JOB}TO TIME LIMIT ***", EndReason.TIME_LIMIT),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.0.", EndReason.OUT_OF_MEMORY),
        ("srun: error: n1: task 0: Out Of Memory", EndReason.OUT_OF_MEMORY),
        ("srun: error: n1: task 0: Exited with exit code 6", None),
        ("ValueError: the job was CANCELLED AT noon DUE TO PREEMPTION", None),
    ],
)
def test_what_slurm_says_in_the_output(output: str, reason: EndReason | None) -> None:
    assert slurm_word(output) is reason


def test_part_of_an_output(tmp_path: Path) -> None:
    file = tmp_path / "out"
    assert read_output(file) == ""
    file.write_text("first\nsecond\n")
    assert read_output(file, 6) == "second\n"
    assert read_output(file, 0, 6) == "first\n"


def _failure(name: str, kind: str = "TrainerError", *, explained: bool = False, killed: bool = False) -> Failure:
    return Failure(name, kind, "", None, explained, killed)


@pytest.mark.parametrize(
    ("failures", "believed"),
    [
        ([_failure("lost its peer"), _failure("killed", killed=True)], "killed"),
        ([_failure("killed", killed=True), _failure("says why", "DataError", explained=True)], "says why"),
        ([_failure("first"), _failure("second")], "first"),
        ([_failure("agreed", "Interrupted", explained=True), _failure("died")], "died"),
        ([_failure("agreed", "Interrupted", explained=True)], None),
    ],
)
def test_which_of_several_failures_is_believed(failures: list[Failure], believed: str | None) -> None:
    found = cause(failures)
    assert (None if found is None else found.name) == believed
