"""Metrics of a step's groups."""

import pytest

from miles.data.sample import FinishReason, Group, Prompt, Sample
from miles.rollout.statistics import rollout_metrics


def sample(prompt: Prompt, reward: float, length: int, finish: FinishReason, **parts: float) -> Sample:
    return Sample(prompt, 0, 0, [1] * length, reward=reward, reward_parts=parts, finish_reason=finish)


def test_metrics_of_two_groups():
    prompt = Prompt("p", [1], "t")
    mixed = Group(
        prompt,
        [
            sample(prompt, 1.0, 2, FinishReason.STOP, exact=1.0, style=0.5),
            sample(prompt, 0.0, 4, FinishReason.LENGTH, exact=0.0),
        ],
    )
    equal = Group(prompt, [sample(prompt, 1.0, 3, FinishReason.STOP, exact=1.0) for _ in range(2)])
    assert rollout_metrics([mixed, equal]) == {
        "reward/mean": 0.75,
        "reward/std": pytest.approx(0.75**0.5 / 2),
        "reward/exact": 0.75,
        "reward/style": 0.5,
        "response/length_mean": 3.0,
        "response/length_max": 4.0,
        "response/truncated_fraction": 0.25,
        "groups/zero_variance_fraction": 0.5,
        "tokens/response": 12.0,
    }
