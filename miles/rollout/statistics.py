"""What the batch of one step looks like in numbers. Pure: a batch from the journal gives the same numbers again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.config.schema import RolloutSection
from miles.data.sample import Group
from miles.rollout.responses import has_equal_rewards
from miles.runs.journal import Batch


def batch_metrics(batch: Batch, section: RolloutSection) -> dict[str, float]:
    """Metrics of a step's decision: those of its groups, how old they are, what was dropped and what is carried.

    `rollout/off_policy_token_fraction` is the share of response tokens that were sampled by older weights than the
    newest of that step; `rollout/staleness_mean` the mean number of steps between the draw of a group and its
    training.
    """
    samples = [sample for group in batch.groups for sample in group.samples]
    tokens = sum(len(sample.response_tokens) for sample in samples)
    old = sum(version < batch.step - 1 for sample in samples for version in sample.weight_versions)
    reasons = [each.reason for each in batch.dropped]
    unfiltered = sum(map(has_equal_rewards, batch.groups)) if section.filter == "zero-variance" else 0
    return {
        **rollout_metrics(batch.groups),
        "groups/filtered": float(reasons.count("zero-variance")),
        "groups/unfiltered": float(unfiltered),
        "groups/quarantined": float(reasons.count("quarantined")),
        "rollout/carried_groups": float(len(batch.carried)),
        "rollout/off_policy_token_fraction": old / max(tokens, 1),
        "rollout/staleness_mean": sum(batch.step - group.born for group in batch.groups) / len(batch.groups),
    }


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of graded groups: rewards, response lengths in tokens, groups whose rewards are all equal.

    `reward/std` is over all samples (population); `reward/<grader>` is the mean score before weighting,
    over the samples that have it.
    """
    samples = [sample for group in groups for sample in group.samples]
    assert samples, "metrics of no samples"
    rewards = np.array([sample.reward for sample in samples], dtype=np.float64)
    lengths = np.array([len(sample.response_tokens) for sample in samples])
    parts = list(dict.fromkeys(name for sample in samples for name in sample.reward_parts))
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **{f"reward/{name}": _mean_part(groups, name) for name in parts},
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated_fraction": sum(sample.truncated for sample in samples) / len(samples),
        "groups/zero_variance_fraction": sum(map(has_equal_rewards, groups)) / len(groups),
        "tokens/response": float(lengths.sum()),
    }


def _mean_part(groups: Sequence[Group], name: str) -> float:
    scores = [sample.reward_parts[name] for group in groups for sample in group.samples if name in sample.reward_parts]
    return sum(scores) / len(scores)
