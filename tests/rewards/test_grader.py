"""Graders as a run uses them: real functions, real processes, real failures."""

import asyncio
import os
import textwrap
import time
from pathlib import Path

import pytest

from miles.config.schema import RewardSection
from miles.data.sample import Group, Prompt, Sample
from miles.errors import DataError
from miles.rewards.grader import build_grader, grader_names


def group(*responses: str, label="1", metadata=None) -> Group:
    prompt = Prompt("p7", [1], "question", label, metadata or {})
    return Group(prompt, [Sample(prompt, i, seed=i, text=text) for i, text in enumerate(responses)])


def grader_file(directory: Path, code: str) -> str:
    file = directory / "my_grader.py"
    file.write_text(textwrap.dedent(code))
    return f"{file}:score"


def grade(groups: list[Group], *rewards: RewardSection):
    grader = build_grader(rewards)
    try:
        asyncio.run(grader.grade(groups))
    finally:
        grader.close()
    return grader


def rewards_of(graded: Group) -> list[float | None]:
    return [sample.reward for sample in graded.samples]


def test_exact_scores_every_sample():
    graded = group("1", " 1\n", "2")
    grade([graded], RewardSection(grader="exact"))
    assert rewards_of(graded) == [1.0, 1.0, 0.0]
    assert graded.samples[0].reward_parts == {"exact": 1.0}


def test_a_python_function_gets_everything_and_runs_in_another_process(tmp_path):
    name = grader_file(
        tmp_path,
        """
        import os
        import helper

        def score(prompt, response, label, metadata, *, bonus):
            assert (prompt, label) == ("question", [1, 2])
            return {"reward": helper.length(response) + bonus, "level": metadata["level"], "pid": os.getpid()}
        """,
    )
    (tmp_path / "helper.py").write_text("def length(text):\n    return len(text)\n")
    graded = group("abc", "", label=[1, 2], metadata={"level": 4})
    grade([graded], RewardSection(grader=name, args={"bonus": 0.5}))
    assert rewards_of(graded) == [3.5, 0.5]
    parts = graded.samples[0].reward_parts
    assert (parts["score"], parts["score/level"]) == (3.5, 4.0)
    assert parts["score/pid"] != os.getpid()


def test_an_async_function_runs_in_the_event_loop_side_by_side(tmp_path):
    name = grader_file(
        tmp_path,
        """
        import asyncio
        waiting = 0

        async def score(prompt, response, label, metadata):
            global waiting
            waiting += 1
            while waiting < 3:  # ends only when three calls are in flight at once
                await asyncio.sleep(0.001)
            return True
        """,
    )
    graded = group("a", "b", "c")
    grade([graded], RewardSection(grader=name))
    assert rewards_of(graded) == [1.0, 1.0, 1.0]


def test_several_graders_are_added_with_their_weights(tmp_path):
    name = grader_file(tmp_path, "def score(prompt, response, label, metadata): return len(response)")
    graded = group("1", "22")
    grade(
        [graded],
        RewardSection(grader="exact", weight=2.0),
        RewardSection(grader=name, weight=-0.25),
        RewardSection(grader="exact", args={"after": "2"}),
    )
    assert rewards_of(graded) == [1.75, -0.5]
    assert graded.samples[1].reward_parts == {"exact": 0.0, "score": 2.0, "exact-2": 0.0}


def test_names_of_graders_are_short_and_unique():
    sections = [RewardSection(grader=name) for name in ("exact", "a.b:fn", "dir/x.py:fn", "math")]
    assert grader_names(sections) == ["exact", "fn", "fn-2", "math"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def score(p, r, l, m): return 1 / 0", ["raised ZeroDivisionError", "my_grader.py:1"]),
        ("async def score(p, r, l, m): raise KeyError('k')", ["raised KeyError: 'k'"]),
        ("import time\ndef score(p, r, l, m): time.sleep(60)", ["took longer than 0.5 s"]),
        ("import asyncio\nasync def score(p, r, l, m): await asyncio.sleep(60)", ["took longer than 0.5 s"]),
        ("import os\ndef score(p, r, l, m): os._exit(9)", ["ended its process (exit status 9)"]),
    ],
)
def test_a_failing_grader_stops_with_its_reason_or_scores_zero(tmp_path, code, words):
    name = grader_file(tmp_path, code)
    with pytest.raises(DataError) as error:
        grade([group("x")], RewardSection(grader=name, timeout=0.5))
    message = str(error.value)
    assert all(word in message for word in [*words, "my_grader.py:score", "'p7'", "response 0", "on_error"])

    graded = group("x", "y")
    counted = grade([graded], RewardSection(grader=name, timeout=0.5, on_error="zero"))
    assert rewards_of(graded) == [0.0, 0.0]
    assert counted.failures == {"score": 2}


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("float('nan')", "nan"),
        ("'1.0'", "a str, not a number"),
        ("None", "a NoneType, not a number"),
        ("{'score': 1}", "without 'reward' (keys: score)"),
        ("{'reward': 1, 'n': 'x'}", "a str as 'n'"),
        ("object()", "object, not a number"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_result_that_is_no_reward_always_stops(tmp_path, expression, words, kind):
    name = grader_file(tmp_path, f"{kind} score(p, r, l, m): return {expression}")
    with pytest.raises(DataError) as error:
        grade([group("x")], RewardSection(grader=name, on_error="zero"))
    assert words in str(error.value) and "'p7'" in str(error.value)


def test_a_process_that_was_killed_is_replaced(tmp_path):
    name = grader_file(
        tmp_path,
        """
        import time

        def score(prompt, response, label, metadata):
            if response == "hang":
                time.sleep(60)
            return 1
        """,
    )
    graded = group("hang", *["ok"] * 6)
    grade([graded], RewardSection(grader=name, timeout=1.0, on_error="zero"))
    assert rewards_of(graded) == [0.0] + [1.0] * 6


def test_closing_ends_the_processes(tmp_path):
    name = grader_file(tmp_path, "import os\ndef score(p, r, l, m): return os.getpid()")
    graded = group("x")
    grade([graded], RewardSection(grader=name))
    pid = int(graded.samples[0].reward or 0)
    assert not Path(f"/proc/{pid}").exists()


def test_the_processes_end_with_their_parent(tmp_path):
    """A trainer that was killed cannot close anything; its graders notice that the pipe is gone."""
    name = grader_file(tmp_path, "import os\ndef score(p, r, l, m): return os.getpid()")
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import os, sys\n"
        "from miles.rewards.processes import Call, GraderProcess\n"
        "process = GraderProcess(sys.argv[1], {})\n"
        "print(int(process.call(Call('', '', None, {}), 20.0).scores['reward']), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )

    async def run() -> int:
        process = await asyncio.create_subprocess_exec(
            os.sys.executable, str(parent), name, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        return int(output)

    pid = asyncio.run(run())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the grader process outlived its parent"
        time.sleep(0.05)


def test_check_wants_labels_for_graders_that_compare():
    prompts = [Prompt("a", [1], "t", "1"), Prompt("b", [1], "t")]
    grader = build_grader([RewardSection(grader="exact")])
    with pytest.raises(DataError, match=r"1 of 2 prompts have none \(first: 'b'\)"):
        grader.check(prompts)
    grader.check(prompts[:1])
