"""Modules that megatron-core lacks without Transformer Engine: packed attention and a sequence-parallel norm.

Used on a CPU, and on a GPU where Transformer Engine is not installed or the dtype is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a packed micro-batch, by torch's scaled_dot_product_attention.

    megatron-core's own `DotProductAttention` refuses packed sequences.
    """

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams,
        **__: Any,
    ) -> torch.Tensor:
        """query [T, heads, D]; key, value [T, kv_heads, D]; returns [T, heads x D]."""
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        sequences = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([self._attend(q, k, v) for q, k, v in sequences]).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One sequence: [tokens, heads, D] to [tokens, heads, D]."""
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient megatron-core sums over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
