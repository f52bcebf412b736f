"""Mixture-of-experts layers whose result for a token does not depend on the other tokens of the batch.

An expert's share of a batch is arbitrary, so the tokens of each expert are padded (`rounding`). Registered in
transformers' `ALL_EXPERTS_FUNCTIONS`; it serves every model whose experts are stored as stacked tensors.

Owns the products of the experts only: routing belongs to the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from miles.engines.embedded.rounding import row_multiple

NAME = "miles_padded"
"""Name of the implementation in transformers' registry."""


def padded_experts(module: Any, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's experts: hidden [T, H], experts int64 [T, k], weights [T, k] -> [T, H]."""
    tokens, top_k = experts.shape
    sorted_experts, order = experts.reshape(-1).sort(stable=True)
    counts = torch.bincount(sorted_experts, minlength=module.num_experts)
    multiple = row_multiple()
    padded = (counts + multiple - 1) // multiple * multiple
    ends = padded.cumsum(0)
    # Where each (token, expert) pair lies among the padded rows: its expert's start plus its rank there.
    rank = torch.arange(tokens * top_k) - (counts.cumsum(0) - counts)[sorted_experts]
    place = torch.empty_like(order).index_copy_(0, order, (ends - padded)[sorted_experts] + rank)
    rows = hidden.new_zeros(int(ends[-1]), hidden.shape[1])
    rows.index_copy_(0, place, hidden.repeat_interleave(top_k, 0))
    outputs = _run(module, rows, ends.to(torch.int32), torch.arange(module.num_experts).repeat_interleave(padded))
    chosen = outputs.index_select(0, place).view(tokens, top_k, -1)
    return (chosen * weights[:, :, None]).sum(1).to(hidden.dtype)


def _run(module: Any, rows: torch.Tensor, ends: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Each expert on its rows: expert e has those before ends[e], and owner[row] is its number."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _product(module, first, rows, ends, owner)
    # `_apply_gate` is how transformers' own implementations reach an architecture's activation.
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _product(module, "down_proj", inner, ends, owner)
    return module.post_expert_norm(outer) if module.has_post_expert_norm else outer


def _product(module: Any, name: str, rows: torch.Tensor, ends: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)
    product = F.grouped_mm(rows, weight if module.is_transposed else weight.transpose(-2, -1), offs=ends)
    return product + getattr(module, f"{name}_bias")[owner] if module.has_bias else product


def is_experts(module: Any) -> bool:
    """Whether `module` calls an implementation from the registry."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts"))


ALL_EXPERTS_FUNCTIONS.register(NAME, padded_experts)
