"""How good a response was, relative to its peers.

Pure functions of rewards. Whole-group filters and reward shaping are not here.
"""

from __future__ import annotations

import torch

STD_EPSILON = 1e-6


def group_relative_advantages(rewards: torch.Tensor, *, normalize_std: bool) -> torch.Tensor:
    """Advantage of each of n responses to one prompt: reward minus group mean, float32 [n] from [n].

    With `normalize_std` divided by (sample standard deviation + 1e-6), n - 1 in the denominator, as in GRPO
    (Shao et al. 2024, arXiv 2402.03300, section 4.1.2); without, Dr. GRPO (Liu et al. 2025, 2503.20783). A
    group whose rewards are all equal, and a group of one, gets exact zeros.
    """
    rewards = rewards.double()
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards, dtype=torch.float32)
    advantages = rewards - rewards.mean()
    if normalize_std:
        advantages /= rewards.std() + STD_EPSILON
    return advantages.float()
