"""Log-probability and entropy of every token from hidden states, without ever holding all logits at once.

Owns the numerics that both trainer backends share: the fused output layer (`linear_token_outputs`) and the
shift between "position that predicts" and "token that is predicted" (`next_token_targets`, `token_outputs`).
Knows neither models nor losses.

Shape legend: T tokens, H hidden size, V rows of the vocabulary on this rank, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from miles.data.batch import MicroBatch
from miles.training.backend import TokenOutputs


def token_outputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> TokenOutputs:
    """`linear_token_outputs` of a packed micro-batch, aligned as in `miles.data.batch`; 0 at sequence starts.

    `hidden` [T, H] is the last hidden state after the final norm, in the order of `micro_batch.tokens`.
    """
    sources, targets = next_token_targets(micro_batch)
    log_probs, entropy = linear_token_outputs(
        hidden[sources],
        weight,
        targets,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        group=group,
        vocab_size=vocab_size,
    )
    total = micro_batch.tokens.numel()
    return TokenOutputs(
        log_probs=log_probs.new_zeros(total).index_copy(0, sources + 1, log_probs),
        entropy=entropy.new_zeros(total).index_copy(0, sources + 1, entropy),
    )


def next_token_targets(micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that predict a token of their own sequence, and those tokens; both int64 [T - S].

    `targets[i] == tokens[sources[i] + 1]`. The last position of a sequence predicts nothing and is left out.
    """
    predicted = torch.nonzero(micro_batch.position_ids).squeeze(1)
    return predicted - 1, micro_batch.tokens[predicted]


def linear_token_outputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the targets and entropy under softmax(hidden @ weight.T / temperature).

    hidden [T, H], weight [V, H] of the same dtype, targets int64 [T]. Returns two float32 tensors [T]
    (float64 for float64 inputs), differentiable in hidden and weight. At most chunk_tokens x V logits
    exist at once; the backward pass computes them again. Products accumulate in float32; logits are not
    rounded to bfloat16.

    With `group` the vocabulary is divided over its ranks in equal blocks of rows, in rank order; hidden,
    targets and the returned values are the same on every rank. The gradient of hidden is already summed over
    the group: the caller must not reduce it again. The gradient of weight is that of the local rows.

    Rows of the whole vocabulary from `vocab_size` on are padding: they take no part and get no gradient.

    An entropy that nothing is computed from costs no backward work.
    """
    first = 0 if group is None else dist.get_rank(group) * weight.shape[0]
    rows = weight.shape[0] if vocab_size is None else min(weight.shape[0], vocab_size - first)
    block = _Block(first, rows, group)
    if rows < weight.shape[0]:
        weight = weight[:rows]
    outputs = _LinearTokenOutputs.apply(hidden, weight, targets, temperature, chunk_tokens, block)
    return cast(tuple[torch.Tensor, torch.Tensor], outputs)


@dataclass(frozen=True, slots=True)
class _Block:
    """The vocabulary rows of this rank."""

    first: int
    rows: int
    group: dist.ProcessGroup | None


class _LinearTokenOutputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
        block: _Block,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns, owned = _local_columns(targets, block)
        group = block.group
        normalizer = hidden.new_empty(targets.shape, dtype=_accumulator(hidden.dtype))
        log_probs, entropy = torch.empty_like(normalizer), torch.empty_like(normalizer)
        for rows in _chunks(len(targets), chunk_tokens):
            logits = _matmul(hidden[rows], weight.t()).div_(temperature)
            maximum = _all_reduce(logits.amax(dim=1), dist.ReduceOp.MAX, group)
            logits.sub_(maximum[:, None])
            target = logits.gather(1, columns[rows, None]).squeeze(1).mul_(owned[rows])
            exponentials = logits.exp()
            local_sums = [target, exponentials.sum(dim=1), exponentials.mul_(logits).sum(dim=1)]
            target, exp_sum, exp_logit_sum = _all_reduce(torch.stack(local_sums), dist.ReduceOp.SUM, group)
            log_probs[rows] = target - exp_sum.log()
            entropy[rows] = exp_sum.log() - exp_logit_sum / exp_sum
            normalizer[rows] = maximum + exp_sum.log()
        ctx.save_for_backward(hidden, weight, columns, owned, normalizer, entropy)
        ctx.temperature, ctx.chunk_tokens, ctx.group = temperature, chunk_tokens, group
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, log_probs_grad: torch.Tensor | None, entropy_grad: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """With z = logits / T: dlog p(y)/dz_v = [v = y] - p_v, dentropy/dz_v = -p_v (log p_v + entropy)."""
        hidden, weight, columns, owned, normalizer, entropy = ctx.saved_tensors
        hidden_grad = torch.zeros_like(hidden, dtype=normalizer.dtype) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=normalizer.dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(columns), ctx.chunk_tokens):
            scores = _matmul(hidden[rows], weight.t()).div_(ctx.temperature).sub_(normalizer[rows, None])
            probs = scores.exp()
            if entropy_grad is None:
                grad = torch.zeros_like(probs)
            else:
                grad = scores.add_(entropy[rows, None]).mul_(probs).mul_(-entropy_grad[rows, None])
            if log_probs_grad is not None:
                grad.sub_(probs.mul_(log_probs_grad[rows, None]))
                grad.scatter_add_(1, columns[rows, None], (log_probs_grad[rows] * owned[rows])[:, None])
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = _matmul(grad, weight)
            if weight_grad is not None:
                weight_grad += _matmul(grad.t(), hidden[rows])
        if hidden_grad is not None:
            hidden_grad = _all_reduce(hidden_grad, dist.ReduceOp.SUM, ctx.group).to(hidden.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _local_columns(targets: torch.Tensor, block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each target in this rank's block, clamped into it, and whether it truly lies there; both [T]."""
    columns = targets - block.first
    return columns.clamp(0, block.rows - 1), (columns >= 0) & (columns < block.rows)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, accumulated and returned in float32 (float64 for float64)."""
    if a.dtype == _accumulator(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _all_reduce(
    value: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(value, op=operation, group=group)
    return value
