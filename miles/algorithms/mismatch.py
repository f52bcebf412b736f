"""How far the trainer's log-probabilities are from those the engine sampled with.

Both compute the same policy with different kernels, so the difference is the floor of the arithmetic, unless
a weight did not arrive. Pure functions; gathering over ranks is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from miles.algorithms.kl import kl_estimate


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Sums over trained tokens, so that parts of a batch can be added."""

    tokens: int
    abs_diff_sum: float
    abs_diff_max: float
    kl_k3_sum: float

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            tokens=self.tokens + other.tokens,
            abs_diff_sum=self.abs_diff_sum + other.abs_diff_sum,
            abs_diff_max=max(self.abs_diff_max, other.abs_diff_max),
            kl_k3_sum=self.kl_k3_sum + other.kl_k3_sum,
        )

    def metrics(self) -> dict[str, float]:
        """The `mismatch/...` metrics of what was added up."""
        tokens = max(self.tokens, 1)
        return {
            "mismatch/log_prob_abs_diff_mean": self.abs_diff_sum / tokens,
            "mismatch/log_prob_abs_diff_max": self.abs_diff_max,
            "mismatch/kl_k3": self.kl_k3_sum / tokens,
        }


NO_MISMATCH = Mismatch(tokens=0, abs_diff_sum=0.0, abs_diff_max=0.0, kl_k3_sum=0.0)
"""What adding starts from."""


def measure_mismatch(
    trainer_log_probs: torch.Tensor, engine_log_probs: torch.Tensor, loss_mask: torch.Tensor
) -> Mismatch:
    """Differences over the tokens with mask 1; all three arguments have one shape.

    The k3 estimate is of KL(engine || trainer), since the engine drew the tokens (Schulman 2020).
    """
    trained = loss_mask > 0
    trainer, engine = trainer_log_probs[trained].double(), engine_log_probs[trained].double()
    difference = (trainer - engine).abs()
    return Mismatch(
        tokens=trainer.numel(),
        abs_diff_sum=difference.sum().item(),
        abs_diff_max=difference.max().item() if trainer.numel() else 0.0,
        kl_k3_sum=kl_estimate(engine, trainer, "k3").sum().item(),
    )
