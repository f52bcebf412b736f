"""Losses: the clipped policy gradient with its corrections and penalties, and supervised fine-tuning.

Pure functions of tensors. Every loss is the sum of per-token losses times `micro_batch.weights`, which
already hold the aggregation over the global batch. Every metric is a sum as well, over the tokens that are
trained on; `token_means` divides by their number when all sums are in.
"""

from __future__ import annotations

import math

import torch

from miles.algorithms.kl import clamped_log_ratio, kl_estimate
from miles.config.schema import AlgorithmSection
from miles.data.batch import MicroBatch
from miles.training.backend import LossFunction, LossOutput, TokenOutputs

TOKENS = "tokens"
"""Metric that counts the tokens that are trained on."""


def policy_loss(algorithm: AlgorithmSection) -> LossFunction:
    """Loss of one policy update. Reads from `extras`, each float32 [T] and finite everywhere:

    `advantages`, `rollout_log_probs` (the engine's), `old_log_probs` (the trainer's before the update, where
    algorithm.old_log_probs is "trainer") and `ref_log_probs` (where algorithm.kl_coef > 0).

    Per token, with r = pi / pi_old, A the advantage and w the importance weight: w * -min(r A, clip(r, 1 -
    clip_low, 1 + clip_high) A) + kl_coef KL(pi, pi_ref) - entropy_coef H(pi) (PPO's clipped surrogate,
    Schulman et al. 2017, arXiv 1707.06347, in the token-level form of GRPO, 2402.03300).
    """

    def loss(outputs: TokenOutputs, micro_batch: MicroBatch) -> LossOutput:
        extras = micro_batch.extras
        engine_log_probs = extras["rollout_log_probs"]
        old_log_probs = extras["old_log_probs"] if algorithm.old_log_probs == "trainer" else engine_log_probs
        ratio = clamped_log_ratio(outputs.log_probs, old_log_probs).exp()
        per_token, clipped = clipped_surrogate(ratio, extras["advantages"], algorithm.clip_low, algorithm.clip_high)
        metrics = {"ratio/mean": ratio, "ratio/clip_fraction": clipped, "entropy": outputs.entropy}
        if algorithm.importance_correction == "tis":
            weight, capped = truncated_importance_weight(old_log_probs, engine_log_probs, algorithm.tis_cap)
            per_token = weight * per_token
            metrics |= {"importance/weight_mean": weight, "importance/capped_fraction": capped}
        if algorithm.kl_coef > 0:
            kl = kl_estimate(outputs.log_probs, extras["ref_log_probs"], algorithm.kl_estimator)
            per_token = per_token + algorithm.kl_coef * kl
            metrics["kl/reference"] = kl
        # Used even with factor 0, the entropy would cost work and memory in the backward pass.
        if algorithm.entropy_coef > 0:
            per_token = per_token - algorithm.entropy_coef * outputs.entropy
        return _weighted_sum(per_token, micro_batch, metrics)

    return loss


def sft_loss(outputs: TokenOutputs, micro_batch: MicroBatch) -> LossOutput:
    """Negative log-likelihood of the tokens that are trained on; its metric is `nll`."""
    negative_log_likelihood = -outputs.log_probs
    return _weighted_sum(negative_log_likelihood, micro_batch, {"nll": negative_log_likelihood})


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token, and where the clip removed the gradient.

    Different bounds are DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476, eq. 10).
    """
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def truncated_importance_weight(
    trainer_log_probs: torch.Tensor, engine_log_probs: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(pi_trainer / pi_engine, cap) per token, without gradient, and where the cap holds.

    Truncated importance sampling of the trainer/engine mismatch (Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training"). Both arguments are log-probabilities before the
    update.
    """
    weight = clamped_log_ratio(trainer_log_probs, engine_log_probs).exp().detach()
    return weight.clamp(max=cap), weight > cap


def token_means(sums: dict[str, float]) -> dict[str, float]:
    """Mean over trained tokens of every metric, from sums over the global batch; without the count itself."""
    tokens = max(sums[TOKENS], 1.0)
    return {name: value / tokens for name, value in sums.items() if name != TOKENS}


def perplexity(mean_negative_log_likelihood: float) -> float:
    """exp of the mean negative log-likelihood per token, at most e^700 (what a float holds)."""
    return math.exp(min(mean_negative_log_likelihood, 700.0))


def _weighted_sum(per_token: torch.Tensor, micro_batch: MicroBatch, metrics: dict[str, torch.Tensor]) -> LossOutput:
    mask = micro_batch.loss_mask
    sums = {name: (value.detach() * mask).sum() for name, value in metrics.items()}
    return LossOutput(loss=(per_token * micro_batch.weights).sum(), metrics=sums | {TOKENS: mask.sum()})
