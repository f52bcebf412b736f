"""pass@k and the result of an evaluation."""

import json
from itertools import combinations

import pytest

from miles.config.schema import DataSection, EvalSection
from miles.data.sample import FinishReason, Group, Prompt, Sample
from miles.rollout.evaluate import pass_at_k, summarize


def graded(rewards: list[float], prompt: str = "p") -> Group:
    row = Prompt(prompt, [1, 2], "text", "label")
    samples = [
        Sample(row, i, i, [7] * (i + 1), text="r", finish_reason=FinishReason.STOP, reward=reward)
        for i, reward in enumerate(rewards)
    ]
    return Group(row, samples)


@pytest.mark.parametrize(("samples", "passed"), [(5, 0), (5, 2), (5, 5), (8, 1), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(samples, passed):
    outcomes = [True] * passed + [False] * (samples - passed)
    for k in range(1, samples + 1):
        subsets = list(combinations(outcomes, k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_summary_and_metrics():
    section = EvalSection(samples=4, pass_at=[1, 2], pass_threshold=0.5)
    result = summarize([graded([1.0, 0.0, 0.5, 0.25], "a"), graded([0.0] * 4, "b")], section)
    assert result.metrics() == {
        "eval/reward": 1.75 / 8,
        "eval/pass@1": 0.25,
        "eval/pass@2": pytest.approx((1 - 1 / 6) / 2),
        "eval/length_mean": 2.5,
        "eval/truncated_fraction": 0.0,
    }


def test_results_file_holds_the_numbers_and_every_response(tmp_path):
    section = EvalSection(data=DataSection(path="unused"))
    summarize([graded([1.0]), graded([0.0], "q")], section).write(tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["reward"], written["pass@1"], written["prompts"], written["samples"]) == (0.5, 0.5, 2, 1)
    assert [row["id"] for row in written["results"]] == ["p", "q"]
    assert written["results"][0]["responses"] == [
        {"text": "r", "reward": 1.0, "reward_parts": {}, "finish_reason": "stop", "length": 1}
    ]
