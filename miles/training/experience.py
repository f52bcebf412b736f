"""From finished groups to the training rows of each optimizer update: advantages, masks, loss weights.

Pure functions of groups. Packing rows into micro-batches belongs to `miles.data.packing`.
"""

from __future__ import annotations

import numpy as np
import torch

from miles.algorithms.advantages import group_relative_advantages
from miles.algorithms.aggregation import token_weights
from miles.config.schema import AlgorithmSection
from miles.data.batch import Sequence
from miles.data.sample import Group, Sample


def build_updates(
    groups: list[Group],
    algorithm: AlgorithmSection,
    *,
    updates: int,
    max_response_tokens: int,
    seed: int,
    only_version: int | None = None,
) -> list[list[Sequence]]:
    """Rows of each of `updates` optimizer updates; every sample is in exactly one.

    Samples are dealt out in a random order that `seed` fixes, so that one update does not hold one kind of prompt.
    Loss weights are normalized within each update. With `only_version`, tokens that other weights sampled are left out
    of the loss.
    """
    rows = [row for group in groups for row in group_rows(group, algorithm, only_version)]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist() if updates > 1 else range(len(rows))
    shuffled = [rows[i] for i in order]
    size = len(shuffled) // updates
    parts = [shuffled[i * size : (i + 1) * size] for i in range(updates)]
    for part in parts:
        masks = [row.loss_mask for row in part]
        weights = token_weights(masks, algorithm.aggregation, max_response_tokens=max_response_tokens)
        for row, weight in zip(part, weights, strict=True):
            row.weights = weight
    return parts


def group_rows(group: Group, algorithm: AlgorithmSection, only_version: int | None = None) -> list[Sequence]:
    """One row per sample of a graded group; its loss weights are still 0."""
    rewards = torch.tensor([sample.reward for sample in group.samples])
    advantages = group_relative_advantages(rewards, normalize_std=algorithm.normalize_std)
    pairs = zip(group.samples, advantages.tolist(), strict=True)
    return [sample_row(sample, advantage, only_version) for sample, advantage in pairs]


def sample_row(sample: Sample, advantage: float, only_version: int | None = None) -> Sequence:
    """Tokens of prompt and response, with the engine's log-probabilities on the response and 0 on the prompt."""
    prompt = len(sample.prompt.tokens)
    tokens = torch.tensor(sample.tokens)
    loss_mask = torch.zeros(len(tokens))
    loss_mask[prompt:] = torch.tensor(sample.loss_mask, dtype=torch.float32)
    if only_version is not None:
        loss_mask[prompt:] *= torch.tensor(sample.weight_versions) == only_version
    log_probs = torch.zeros(len(tokens))
    log_probs[prompt:] = torch.tensor(sample.log_probs)
    return Sequence(
        tokens=tokens,
        loss_mask=loss_mask,
        weights=torch.zeros(len(tokens)),
        extras={"advantages": loss_mask * advantage, "rollout_log_probs": log_probs},
        routed_experts=sample.routed_experts,
    )
