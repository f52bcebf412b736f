"""Metrics of a step's groups."""

import pytest

from miles.config.schema import RolloutSection
from miles.data.sample import FinishReason, Group, Prompt, Sample
from miles.rollout.statistics import batch_metrics, rollout_metrics
from miles.runs.journal import Batch, Dropped


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


def test_metrics_of_a_decision():
    prompt = Prompt("p", [1], "t")
    old = sample(prompt, 1.0, 4, FinishReason.STOP)
    new = sample(prompt, 0.0, 2, FinishReason.STOP)
    old.weight_versions, new.weight_versions = [3, 3, 4, 4], [4, 4]
    groups = [Group(prompt, [old, new], born=3), Group(prompt, [new, new], born=5)]
    dropped = [Dropped(i, "p", "zero-variance") for i in range(3)] + [Dropped(9, "q", "quarantined")]
    batch = Batch(5, groups, [Group(prompt, [])], dropped, cursor=12, quarantined_total=4)
    metrics = batch_metrics(batch, RolloutSection(filter="zero-variance"))
    assert (
        metrics.items()
        >= {
            "groups/filtered": 3.0,
            "groups/unfiltered": 1.0,
            "groups/quarantined": 1.0,
            "rollout/carried_groups": 1.0,
            "rollout/off_policy_token_fraction": 0.2,
            "rollout/staleness_mean": 1.0,
            "reward/mean": 0.25,
        }.items()
    )
    assert batch_metrics(batch, RolloutSection())["groups/unfiltered"] == 0
