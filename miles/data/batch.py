"""Tensors that a trainer consumes: a `Sequence` per sample, `MicroBatch` for several packed end to end.

Alignment, everywhere: index t of every per-token field speaks about token t being *predicted* from tokens <
t. So `log_probs[t] = log p(tokens[t] | tokens[:t])`, and index 0 of every sequence is never trained on (its
mask and weight are 0).

Weights: `weights[t]` already contains the loss aggregation over the *global* batch (for example 1/total
tokens for a token mean). The loss of a batch is therefore the plain sum over all micro-batches and
data-parallel ranks, which makes loss and gradient independent of how the batch was split.

Shape legend: T tokens of a micro-batch, S sequences in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch


@dataclass(slots=True)
class Sequence:
    """One training row on the CPU. All tensors have shape [len]."""

    tokens: torch.Tensor
    """int64"""
    loss_mask: torch.Tensor
    """float32, 1.0 on tokens that are trained on"""
    weights: torch.Tensor
    """float32, loss weight of each token over the global batch; 0 where masked"""
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further float32 fields [len]: advantages, rollout_log_probs, old_log_probs, ref_log_probs"""
    routed_experts: np.ndarray | None = None
    """Unsigned [len - 1, layers, top_k], recorded by the engine"""

    def __len__(self) -> int:
        return self.tokens.numel()


@dataclass(slots=True)
class MicroBatch:
    """Sequences packed end to end (no padding). All per-token tensors have shape [T]."""

    tokens: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    """int32 [S + 1], offsets of the sequences"""
    loss_mask: torch.Tensor
    weights: torch.Tensor
    extras: dict[str, torch.Tensor]
    indices: list[int]
    """Index of each sequence in the list that was packed; -1 for a dummy that only keeps ranks in step."""
    routed_experts: list[np.ndarray | None] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).tolist()

    @property
    def is_dummy(self) -> bool:
        """Nothing in it is trained on; see `miles.data.packing`."""
        return self.indices == [-1]

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        return MicroBatch(
            tokens=self.tokens.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            loss_mask=self.loss_mask.to(device),
            weights=self.weights.to(device),
            extras={name: value.to(device) for name, value in self.extras.items()},
            indices=self.indices,
            routed_experts=self.routed_experts,
        )


def pack(sequences: list[Sequence], indices: list[int]) -> MicroBatch:
    """Concatenate `sequences[i] for i in indices` into one micro-batch."""
    rows = [sequences[i] for i in indices]
    names = list(rows[0].extras)
    return MicroBatch(
        tokens=torch.cat([row.tokens for row in rows]),
        position_ids=torch.cat([torch.arange(len(row)) for row in rows]),
        cu_seqlens=torch.tensor([0, *accumulate(len(row) for row in rows)], dtype=torch.int32),
        loss_mask=torch.cat([row.loss_mask for row in rows]),
        weights=torch.cat([row.weights for row in rows]),
        extras={name: torch.cat([row.extras[name] for row in rows]) for name in names},
        indices=list(indices),
        routed_experts=[row.routed_experts for row in rows],
    )


def unpack(micro_batch: MicroBatch) -> list[Sequence]:
    """The sequences of a micro-batch on their own again: `unpack(pack(rows, range(len(rows))))` equals `rows`."""
    lengths = micro_batch.lengths
    fields = {name: value.split(lengths) for name, value in micro_batch.extras.items()}
    parts = zip(
        micro_batch.tokens.split(lengths),
        micro_batch.loss_mask.split(lengths),
        micro_batch.weights.split(lengths),
        micro_batch.routed_experts,
        strict=True,
    )
    return [
        Sequence(tokens, mask, weights, {name: split[i] for name, split in fields.items()}, routes)
        for i, (tokens, mask, weights, routes) in enumerate(parts)
    ]
