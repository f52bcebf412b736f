"""Log-probabilities of sampled tokens."""

from __future__ import annotations

import torch

from miles.engines.embedded.sampling import SamplingParams, draw


def test_log_probabilities_are_exact_to_float32_over_a_large_vocabulary() -> None:
    logits = 3 * torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(max_new_tokens=1, temperature=0.8, top_p=1.0, top_k=-1, seed=row) for row in range(64)]
    drawn = draw(logits, params, [0] * 64)
    exact = (logits.double() / 0.8).log_softmax(-1)[range(64), drawn.tokens]
    error = torch.tensor(drawn.log_probs, dtype=torch.float64) - exact
    assert error.abs().max() < 5e-6
