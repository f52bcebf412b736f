"""Packed attention against a dense mask, and the router's balancing loss against transformers' own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from miles.errors import DataError
from miles.training.fsdp.attention import packed_attention
from miles.training.fsdp.router import load_balancing_loss

LENGTHS = [3, 1, 6]


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, 10, 8, generator=generator) for heads in (4, 2, 2))


def dense_mask(window: int) -> torch.Tensor:
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    distance = torch.arange(10)[:, None] - torch.arange(10)[None]
    return (sequence[:, None] == sequence[None]) & (distance >= 0) & (distance < window)


def call(*tensors: torch.Tensor, **arguments: object) -> torch.Tensor:
    offsets = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    output, _ = packed_attention(
        torch.nn.Identity(), *tensors, None, cu_seq_lens_q=offsets, max_length_q=6, **arguments
    )
    return output


@pytest.mark.parametrize("window", [None, 2, 6])
def test_equals_attention_with_a_dense_mask(window: int | None) -> None:
    query, key, value = inputs()
    expected = scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, dim=1),
        value.repeat_interleave(2, dim=1),
        attn_mask=dense_mask(window or 10),
        scale=0.3,
    )
    output = call(query, key, value, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_arguments_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(DataError, match="needs 'softcap'"):
        call(*inputs(), softcap=50.0)


def test_balancing_loss_is_transformers_for_one_layer() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    # transformers counts every one of the k assignments of a token as a whole token.
    expected = load_balancing_loss_func((logits,), num_experts=4, top_k=2) / 2
    torch.testing.assert_close(load_balancing_loss((logits,), top_k=2), expected)


def test_perfect_balance_adds_one_per_layer() -> None:
    logits = torch.eye(4).repeat(5, 1) * 1e-4
    torch.testing.assert_close(load_balancing_loss((logits, logits), top_k=1), torch.tensor(2.0))
