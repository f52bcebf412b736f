"""Estimators of KL(policy || reference) from samples of the policy.

Source: Schulman 2020, http://joschu.net/blog/kl-approx.html. Pure functions of log-probabilities.
"""

from __future__ import annotations

from typing import Literal

import torch

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before exp, so that one absurd token cannot make the sum infinite."""


def clamped_log_ratio(log_probs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """log_probs - other within +-20. No gradient flows where the bound holds."""
    return (log_probs - other).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def kl_estimate(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Per-token estimate, differentiable in log_probs. With d = log p - log p_ref:

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. As values, k1 and k3 are unbiased and k3 is never negative.
    As a loss on policy, k2 has the gradient of the KL in the mean, while that of k1 has mean zero.
    """
    difference = clamped_log_ratio(log_probs, ref_log_probs)
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return torch.exp(-difference) - 1 + difference
