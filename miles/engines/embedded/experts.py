"""Mixture-of-experts layers whose result for a token does not depend on the other tokens of the batch.

Matrix kernels round differently below a few rows, and an expert's share of a batch is arbitrary. So the tokens of
each expert are padded to a multiple of `ROWS`. Registered in transformers' `ALL_EXPERTS_FUNCTIONS`; it serves every
model whose experts are stored as stacked tensors.

Owns the products of the experts only: routing belongs to the model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "miles_padded"
"""Name of the implementation in transformers' registry."""
ROWS = 16
"""Row counts of matrix products are multiples of this."""


def padded_experts(module: Any, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's experts: hidden [T, H], experts int64 [T, k], weights [T, k] -> [T, H]."""
    tokens, top_k = experts.shape
    sorted_experts, order = experts.reshape(-1).sort(stable=True)
    counts = torch.bincount(sorted_experts, minlength=module.num_experts)
    padded = (counts + ROWS - 1) // ROWS * ROWS
    starts = padded.cumsum(0) - padded
    # Where each (token, expert) pair lies among the padded rows: its expert's start plus its rank there.
    rank = torch.arange(tokens * top_k) - (counts.cumsum(0) - counts)[sorted_experts]
    place = torch.empty_like(order)
    place[order] = starts[sorted_experts] + rank
    rows = hidden.new_zeros(int(padded.sum()), hidden.shape[1])
    rows[place] = hidden.repeat_interleave(top_k, 0)
    outputs = torch.empty_like(rows)
    for expert, (start, size) in enumerate(zip(starts.tolist(), padded.tolist(), strict=True)):
        if size:
            outputs[start : start + size] = _expert(module, expert, rows[start : start + size])
    return (outputs[place].view(tokens, top_k, -1) * weights[:, :, None]).sum(1).to(hidden.dtype)


def _expert(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _product(module, first, expert, rows)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _product(module, "down_proj", expert, inner)
    return module.post_expert_norm(outer) if module.has_post_expert_norm else outer


def _product(module: Any, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    product = rows @ (weight if module.is_transposed else weight.T)
    return product + getattr(module, f"{name}_bias")[expert] if module.has_bias else product


def is_experts(module: Any) -> bool:
    """Whether `module` calls an implementation from the registry."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts"))


ALL_EXPERTS_FUNCTIONS.register(NAME, padded_experts)
