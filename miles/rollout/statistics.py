"""What the groups of one step look like in numbers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.data.sample import Group


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
        "groups/zero_variance_fraction": sum(map(_has_equal_rewards, groups)) / len(groups),
        "tokens/response": float(lengths.sum()),
    }


def _mean_part(groups: Sequence[Group], name: str) -> float:
    scores = [sample.reward_parts[name] for group in groups for sample in group.samples if name in sample.reward_parts]
    return sum(scores) / len(scores)


def _has_equal_rewards(group: Group) -> bool:
    """Such a group has no advantage to learn from."""
    return len({sample.reward for sample in group.samples}) == 1
