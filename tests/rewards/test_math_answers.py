"""The `math` grader: which answers count as equal, and that its timeouts work inside a run."""

import asyncio

import pytest

from miles.config.schema import RewardSection
from miles.data.sample import Group, Prompt, Sample
from miles.errors import DataError
from miles.rewards.grader import build_grader
from miles.rewards.math_answers import math


@pytest.mark.parametrize(
    ("response", "label", "score"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so $\frac{2}{4}$", r"\frac{1}{2}", 1.0),
        ("The answer is 72.", 72, 1.0),
        ("The answer is 1,234", "1234", 1.0),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1.0),
        (r"first 3, then \boxed{4}", "3", 0.0),
        (r"\boxed{3} but the final answer is 4", "3", 1.0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
        ("no number here", "3", 0.0),
        ("", "3", 0.0),
        (r"\boxed{", "3", 0.0),
    ],
)
def test_equality(response, label, score):
    assert math("prompt", response, label, {}) == score


def test_boxed_only_ignores_bare_answers():
    assert math("prompt", "the answer is 3", "3", {}) == 1.0
    assert math("prompt", "the answer is 3", "3", {}, boxed=True) == 0.0
    assert math("prompt", r"\boxed{3}", "3", {}, boxed=True) == 1.0


def grade(samples: list[Sample]) -> None:
    grader = build_grader([RewardSection(grader="math")])
    try:
        asyncio.run(grader.grade([Group(samples[0].prompt, samples)]))
    finally:
        grader.close()


def test_in_a_run_it_scores_a_response_that_never_simplifies_as_wrong():
    prompt = Prompt("p", [1], "q", "12")
    samples = [Sample(prompt, 0, 0, text=r"\boxed{12}"), Sample(prompt, 1, 0, text=r"\boxed{9^{9^{9^{9}}}}")]
    grade(samples)
    assert [sample.reward for sample in samples] == [1.0, 0.0]


def test_a_label_without_an_expression_stops():
    with pytest.raises(DataError, match=r"'math' raised ValueError: label '' holds no mathematical expression"):
        grade([Sample(Prompt("p", [1], "q", ""), 0, 0, text="3")])
