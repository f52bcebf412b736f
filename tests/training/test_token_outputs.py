"""The fused output layer against the naive computation: values, gradients, vocabulary blocks, alignment."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from miles.data.batch import Sequence, pack
from miles.training.token_outputs import linear_token_outputs, next_token_targets, token_outputs

TOKENS, HIDDEN, VOCABULARY = 11, 6, 10


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_softmax = (hidden @ weight.t() / temperature).log_softmax(dim=-1)
    log_probs = log_softmax.gather(1, targets[:, None]).squeeze(1)
    return log_probs, -(log_softmax.exp() * log_softmax).sum(dim=-1)


def gradients(
    outputs: tuple[torch.Tensor, torch.Tensor], inputs: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Gradients of one fixed mixture of both outputs."""
    factors = torch.linspace(-1.0, 2.0, 2 * TOKENS).to(outputs[0].dtype)
    loss = (outputs[0] * factors[:TOKENS] + outputs[1] * factors[TOKENS:]).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_naive(chunk_tokens: int, temperature: float) -> None:
    hidden, weight, targets = problem()
    outputs = linear_token_outputs(hidden, weight, targets, temperature=temperature, chunk_tokens=chunk_tokens)
    expected = naive(hidden, weight, targets, temperature)
    torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        gradients(outputs, (hidden, weight)), gradients(expected, (hidden, weight)), atol=1e-5, rtol=1e-5
    )


def test_gradcheck() -> None:
    hidden, weight, targets = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_token_outputs(h, w, targets, temperature=0.7, chunk_tokens=4), (hidden, weight)
    )


def test_entropy_takes_no_part_when_unused() -> None:
    hidden, weight, targets = problem()
    log_probs, _ = linear_token_outputs(hidden, weight, targets, temperature=1.0, chunk_tokens=4)
    expected, _ = naive(hidden, weight, targets, 1.0)
    torch.testing.assert_close(
        torch.autograd.grad(log_probs.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_bfloat16_logits_are_not_rounded() -> None:
    hidden, weight, targets = problem(torch.bfloat16)
    outputs = linear_token_outputs(hidden, weight, targets, temperature=1.0, chunk_tokens=4)
    expected = naive(hidden.float(), weight.float(), targets, 1.0)
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    assert [g.dtype for g in gradients(outputs, (hidden, weight))] == [torch.bfloat16] * 2


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = problem()
    outputs = linear_token_outputs(hidden * 1e4, weight, targets, temperature=1.0, chunk_tokens=4)
    assert all(torch.isfinite(value).all() for value in outputs)
    torch.testing.assert_close(outputs[1], torch.zeros(TOKENS), atol=1e-6, rtol=0)


def vocabulary_parallel_rank(rank: int, world_size: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    hidden, weight, targets = problem()
    block = weight.detach().chunk(world_size)[rank].clone().requires_grad_()
    outputs = linear_token_outputs(hidden, block, targets, temperature=0.7, chunk_tokens=4, group=dist.group.WORLD)
    hidden_grad, block_grad = gradients(outputs, (hidden, block))
    torch.save([*outputs, hidden_grad, block_grad], Path(directory) / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_vocabulary_parallel_equals_naive(tmp_path: Path) -> None:
    mp.start_processes(vocabulary_parallel_rank, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    hidden, weight, targets = problem()
    expected = naive(hidden, weight, targets, 0.7)
    hidden_grad, weight_grad = gradients(expected, (hidden, weight))
    for log_probs, entropy, rank_hidden_grad, _ in ranks:
        torch.testing.assert_close((log_probs, entropy), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(rank_hidden_grad, hidden_grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([values[3] for values in ranks]), weight_grad, atol=1e-5, rtol=1e-5)


def packed(lengths: list[int]) -> tuple[torch.Tensor, list[Sequence]]:
    tokens = torch.arange(sum(lengths)) % VOCABULARY
    rows = [
        Sequence(tokens=part, loss_mask=torch.ones(len(part)), weights=torch.ones(len(part)))
        for part in tokens.split(lengths)
    ]
    return tokens, rows


def test_targets_do_not_cross_sequences() -> None:
    tokens, rows = packed([3, 1, 2])
    sources, targets = next_token_targets(pack(rows, [0, 1, 2]))
    assert sources.tolist() == [0, 1, 4]
    assert targets.tolist() == [tokens[1], tokens[2], tokens[5]]


def test_outputs_are_aligned_with_the_predicted_token() -> None:
    _, rows = packed([3, 1, 2])
    micro_batch = pack(rows, [0, 1, 2])
    hidden, weight, _ = problem()
    outputs = token_outputs(hidden[:6], weight, micro_batch, temperature=1.0, chunk_tokens=2)
    assert outputs.log_probs[[0, 3, 4]].tolist() == outputs.entropy[[0, 3, 4]].tolist() == [0.0] * 3
    expected, entropy = naive(hidden[[0, 1, 4]], weight, micro_batch.tokens[[1, 2, 5]], 1.0)
    torch.testing.assert_close(outputs.log_probs[[1, 2, 5]], expected)
    torch.testing.assert_close(outputs.entropy[[1, 2, 5]], entropy)


def test_a_sequence_of_one_token_has_no_targets() -> None:
    _, rows = packed([1])
    hidden, weight, _ = problem()
    outputs = token_outputs(hidden[:1], weight, pack(rows, [0]), temperature=1.0, chunk_tokens=2)
    outputs.log_probs.sum().backward()
    assert outputs.log_probs.tolist() == [0.0]
    assert hidden.grad is not None and hidden.grad.abs().sum() == 0
