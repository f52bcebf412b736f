"""Sampling that depends on the request alone: parameters, counter-based noise, truncation, log-probabilities.

The token at position p of a request with seed s is argmax over v of `logits[v] / temperature + gumbel(s, p, v)`
(the Gumbel-max trick; Gumbel 1954). The noise is a hash, not a stream: neither other requests nor a pause, an abort
and a continuation from the partial response change what is drawn.

Owns arithmetic only; who samples when belongs to `scheduler`. Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

ALL_TOKENS = 1 << 30
"""top_k that keeps everything (SGLang's own constant for -1)."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one response is drawn; names, defaults and meaning are SGLang's."""

    max_new_tokens: int
    temperature: float
    """0 was translated to top_k = 1 at temperature 1, as SGLang does."""
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


@dataclass(frozen=True, slots=True)
class Draw:
    """One token of each row."""

    tokens: list[int]
    log_probs: list[float]
    """Under the temperature-scaled distribution before top_k and top_p, as SGLang reports."""


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Draw:
    """Sample one token per row from logits [R, V]; `positions[r]` is where row r's token will stand."""
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    scaled = logits.float() / temperatures[:, None]
    scores = _truncate(scaled, params)
    noisy = [row for row, p in enumerate(params) if p.top_k != 1]
    if noisy:
        seeds = [params[row].seed for row in noisy]
        noise = gumbel(seeds, [positions[row] for row in noisy], logits.shape[1])
        scores = scores.index_add(0, torch.tensor(noisy), noise)
    tokens = scores.argmax(-1)
    return Draw(tokens=tokens.tolist(), log_probs=log_probs_of(scaled, tokens).tolist())


def log_probs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability [R] of one token per row of float32 logits [R, V].

    Not `log_softmax`: on a CPU that sums a row in one float32 and is off by up to 1e-5 at 50,000 tokens.
    """
    if len(logits) == 1:
        # The threads would share the sum of a single row, which rounds differently from a row in a batch.
        return log_probs_of(logits.repeat(2, 1), tokens.repeat(2))[:1]
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _truncate(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """-inf for tokens outside top_k and, within it, outside the smallest set with probability top_p."""
    rows = [row for row, p in enumerate(params) if 1 < p.top_k < scaled.shape[1] or p.top_p < 1.0]
    if not rows:
        return scaled
    top_k = torch.tensor([params[row].top_k for row in rows])
    top_p = torch.tensor([params[row].top_p for row in rows])
    values, order = scaled[rows].sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    drop = (before > top_p[:, None]) | (torch.arange(values.shape[1]) >= top_k[:, None])
    kept = values.masked_fill(drop, -torch.inf)
    truncated = scaled.clone()
    truncated[rows] = torch.empty_like(kept).scatter_(1, order, kept)
    return truncated


def gumbel(seeds: Sequence[int], positions: Sequence[int], vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise float32 [R, V], a pure function of (seed, position, token id)."""
    bases = np.array([_mix(_mix(seed) + position) for seed, position in zip(seeds, positions, strict=True)], np.uint64)
    with np.errstate(over="ignore"):
        x = bases[:, None] + np.arange(vocabulary, dtype=np.uint64) * np.uint64(_GOLDEN)
        # splitmix64's finalizer (Steele, Lea, Flood 2014), in place.
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    uniform = torch.from_numpy((x >> np.uint64(11)).astype(np.float64)).add_(0.5).mul_(2.0**-53)
    return uniform.neg_().log1p_().neg_().log_().neg_().float()


def _mix(x: int) -> int:
    """splitmix64: a 64-bit hash of one integer."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
