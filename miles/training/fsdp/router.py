"""Load-balancing loss of mixture-of-experts routers."""

from __future__ import annotations

import torch


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Sum over layers of E sum_e f_e P_e, float32 scalar; `router_logits` holds [T, E] of each MoE layer.

    f_e is the share of the T x top_k assignments that expert e got and P_e the mean of its probability over
    the T tokens (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6, with f extended to
    top-k). A layer that balances perfectly adds 1. Not linear in the tokens: the mean over micro-batches is
    not the batch's value.
    """
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        tokens, experts = logits.shape
        probs = logits.float().softmax(dim=-1)
        assigned = probs.topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(assigned, minlength=experts) / (tokens * top_k)
        total = total + experts * (share * probs.mean(dim=0)).sum()
    return total
