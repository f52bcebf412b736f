"""Attention of packed sequences for Hugging Face models: a token sees its own sequence's past only.

Registers one attention function with transformers. It reads the offsets that `FlashAttentionKwargs` carries
through the model and builds no mask of T x T: on GPUs in half precision it calls PyTorch's variable-length
flash attention, elsewhere scaled-dot-product attention once per sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from miles.errors import DataError

PACKED_ATTENTION = "miles_packed"
"""Name for `attn_implementation`."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed sequence, with the signature of transformers' attention functions.

    query [1, heads, T, D], key and value [1, key-value heads, T, D]; returns [1, T, heads, D]. With
    `sliding_window` a token sees that many tokens, itself included. Dropout is never applied.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise DataError(
                f"{type(module).__name__} needs {name!r}, which the fsdp backend's attention does not have",
                fix="choose another model",
            )
    # Neither path takes fewer key-value heads in every supported version of PyTorch.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        output = _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        output = _per_sequence(query, key, value, cu_seq_lens_q, scaling, window)
    return output, None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    output = varlen_attn(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
    )
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


def _per_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    lengths = offsets.diff().tolist()
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = None if window is None else _banded(q.shape[2], window, q.device)
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _banded(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool [length, length]: the last `window` positions up to and including one's own."""
    full = torch.ones(length, length, dtype=torch.bool, device=device)
    return full.tril().triu(1 - window)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
