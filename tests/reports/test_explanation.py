"""Why a run is where it is, told from its record."""

from pathlib import Path

from miles.reports.explain import Explanation, evidence_of, explain
from miles.runs.attempts import Attempt, EndReason
from miles.runs.paths import RunPaths
from miles.workflow.status import ClusterView, JobStatus, RunStatus, State, StepStatus


def _job(state: str, *, live: bool, waiting: bool, reason: str = "", restarts: int = 0) -> JobStatus:
    return JobStatus("grpo", 12, "12", "first", 0.0, state, live, waiting, reason, restarts, [], None, None)


def _explain(state: State, reason: EndReason | None, *jobs: JobStatus, detail: str = "") -> Explanation:
    step = StepStatus("grpo", "rl", state, 1, 0.0, 60.0, reason, detail, "")
    status = RunStatus("demo", "/runs/demo", state, None, [step], ClusterView(list(jobs)))
    ended = None if reason is None else 60.0
    attempts = [Attempt(1, "grpo", "n1", 0.0, ended=ended, reason=reason)]
    return explain(status, attempts, ["slurm-grpo-12.out: oom-kill event"], run="demo")


def test_an_end_has_its_reason_its_evidence_and_a_remedy() -> None:
    told = _explain(State.FAILED, EndReason.OUT_OF_MEMORY, _job("OUT_OF_MEMORY", live=False, waiting=False))
    assert told.cause.startswith("step 'grpo' failed: out-of-memory")
    assert "slurm.memory_per_node" in told.cause
    assert told.evidence[0].startswith("attempt 1 of grpo: out-of-memory")
    assert told.evidence[1:] == ["job 12 of grpo: OUT_OF_MEMORY", "slurm-grpo-12.out: oom-kill event"]
    assert told.remedies[0][0] == "miles resume demo"


def test_a_preempted_run_that_waits_says_why_and_what_happened_before() -> None:
    told = _explain(
        State.QUEUED, EndReason.PREEMPTED, _job("PENDING", live=True, waiting=True, reason="BeginTime", restarts=2)
    )
    assert told.cause.startswith("job 12 of step 'grpo' waits (BeginTime: Slurm waits a little")
    assert "interrupted 2 x" in told.cause
    assert told.evidence == ["attempt 1 of grpo: preempted, at " + told.evidence[0].split(", at ")[1]]


def test_a_killed_step_without_any_word_is_killed() -> None:
    assert "was killed: killed" in _explain(State.KILLED, None, detail="its process is gone and left no word").cause


def test_evidence_is_the_telling_lines_of_the_last_job(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.all_logs.mkdir()
    paths.slurm_log("grpo", 12).write_text(
        "all is well\nslurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***\n"
    )
    status = RunStatus("demo", str(tmp_path), State.QUEUED, None, [])
    (line,) = evidence_of(paths, status)
    assert line.startswith("slurm-grpo-12.out: slurmstepd: error: *** STEP 12.0")
