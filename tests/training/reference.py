"""What both trainer backends are compared with: tiny models, one ragged batch, and Hugging Face on both.

Owns the numbers only: no parallelism, no packing. Every sequence runs alone through `AutoModelForCausalLM` in
float32, its logits go through `log_softmax`, and autograd does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from miles.data.batch import MicroBatch, Sequence, pack
from miles.training.backend import LossOutput, TokenOutputs
from miles.training.fsdp.router import load_balancing_loss

VOCAB = 131
"""Odd, so that a tensor-parallel vocabulary needs padding."""
LENGTHS = (3, 17, 9, 23, 2, 12, 7, 21)
"""Even in total, odd in parts: sequence parallelism pads the parts only."""
TEMPERATURE = 0.8
LR = 1e-2
ADAM_EPS = 1e-3
"""Large beside the gradients' rounding errors, so that the first Adam steps are not the gradients' signs."""
CLIP_GRAD = 1.0
BETAS = (0.9, 0.95)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "dtype": "float32",
}
_MOE: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "norm_topk_prob": True,
}

_NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**_COMMON, intermediate_size=48, head_dim=16, tie_word_embeddings=False),
    "qwen3-tied": lambda: Qwen3Config(**_COMMON, intermediate_size=48, head_dim=16, tie_word_embeddings=True),
    "qwen3-moe": lambda: Qwen3MoeConfig(**_COMMON, **_MOE, tie_word_embeddings=False),
    "qwen3-moe-tied": lambda: Qwen3MoeConfig(**_COMMON, **_MOE, tie_word_embeddings=True),
    "qwen3-moe-mixed": lambda: Qwen3MoeConfig(
        **_COMMON, **{**_MOE, "norm_topk_prob": False}, mlp_only_layers=[1], tie_word_embeddings=False
    ),
    "qwen2": lambda: Qwen2Config(**_COMMON, intermediate_size=48, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, dtype="float32", **_NO_DROPOUT
    ),
    "llama": lambda: LlamaConfig(
        **_COMMON,
        intermediate_size=48,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
}


def build_model(name: str, directory: Path, *, seed: int = 0) -> Path:
    """Write a random float32 model of `MODELS` to `directory`. Norms, biases and routers are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(MODELS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def sequences(seed: int = 1) -> list[Sequence]:
    """One ragged batch with masked prompts, advantages of both signs and a token-mean weight."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        mask = (torch.arange(length) >= max(1, length // 3)).float()
        rows.append((torch.randint(0, VOCAB, (length,), generator=generator), mask))
    total = sum(mask.sum() for _, mask in rows)
    return [
        Sequence(
            tokens=tokens,
            loss_mask=mask,
            weights=mask / total,
            extras={"advantages": torch.randn(len(tokens), generator=generator)},
        )
        for tokens, mask in rows
    ]


def micro_batches(rows: list[Sequence], count: int, rank: int = 0, ranks: int = 1) -> list[MicroBatch]:
    """Rank `rank`'s share of the rows in `count` packed micro-batches, dealt round robin."""
    mine = list(range(len(rows)))[rank::ranks]
    return [pack(rows, mine[i::count]) for i in range(count)]


def loss(outputs: TokenOutputs, micro_batch: MicroBatch) -> LossOutput:
    """A policy-gradient loss with an entropy bonus: both outputs get a gradient."""
    advantages = micro_batch.extras["advantages"]
    entropy = (micro_batch.weights * outputs.entropy).sum()
    objective = (micro_batch.weights * advantages * outputs.log_probs).sum()
    metrics = {"entropy": entropy.detach(), "tokens": micro_batch.loss_mask.sum()}
    return LossOutput(loss=-objective - 0.1 * entropy, metrics=metrics)


@dataclass(frozen=True, slots=True)
class Reference:
    """Results of plain Hugging Face; tensors by the names and shapes of the checkpoint."""

    outputs: list[TokenOutputs]
    """Of each sequence."""
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    grad_norm: float
    updated: list[dict[str, torch.Tensor]]
    """Weights after one and after two clipped AdamW steps on the same batch."""


def hugging_face(directory: Path, rows: list[Sequence], balance: float = 0.0) -> Reference:
    """Log-probabilities, loss, gradients and two optimizer steps of the model in `directory`.

    `balance` is the coefficient of the routers' balancing loss of all rows together. It joins the gradient but not
    the loss.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=ADAM_EPS, weight_decay=0.0)
    outputs = [_token_outputs(model, row.tokens) for row in rows]
    parts = [loss(out, pack(rows, [i])) for i, out in enumerate(outputs)]
    torch.stack([part.loss for part in parts]).sum().backward()
    _add_balance_gradient(model, rows, balance)
    gradients = dict(checkpoint_tensors((n, p.grad.clone()) for n, p in model.named_parameters()))
    updated = []
    grad_norms = []
    for _ in range(2):
        optimizer.zero_grad()
        for i, row in enumerate(rows):
            loss(_token_outputs(model, row.tokens), pack(rows, [i])).loss.backward()
        _add_balance_gradient(model, rows, balance)
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)))
        optimizer.step()
        updated.append(dict(checkpoint_tensors((n, p.detach().clone()) for n, p in model.named_parameters())))
    return Reference(
        outputs=[TokenOutputs(out.log_probs.detach(), out.entropy.detach()) for out in outputs],
        loss=sum(float(part.loss.detach()) for part in parts),
        metrics={name: sum(float(part.metrics[name]) for part in parts) for name in parts[0].metrics},
        gradients=gradients,
        grad_norm=grad_norms[0],
        updated=updated,
    )


def _token_outputs(model: PreTrainedModel, tokens: torch.Tensor) -> TokenOutputs:
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float() / TEMPERATURE
    log_softmax = logits.log_softmax(-1)
    log_probs = log_softmax.gather(1, tokens[1:, None]).squeeze(1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    start = log_probs.new_zeros(1)
    return TokenOutputs(torch.cat([start, log_probs]), torch.cat([start, entropy]))


def _add_balance_gradient(model: PreTrainedModel, rows: list[Sequence], balance: float) -> None:
    if balance:
        routed = [model(row.tokens[None], output_router_logits=True).router_logits for row in rows]
        layers = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
        (balance * load_balancing_loss(layers, model.config.num_experts_per_tok)).backward()


def checkpoint_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Transformers 5 fuses the experts of a layer in memory; checkpoints hold one tensor an expert."""
    for name, value in named:
        fused = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if fused is None:
            yield name, value
            continue
        for expert, matrix in enumerate(value):
            if fused[2] == "down_proj":
                yield f"{fused[1]}.{expert}.down_proj.weight", matrix
            else:
                gate, up = matrix.chunk(2)
                yield f"{fused[1]}.{expert}.gate_proj.weight", gate
                yield f"{fused[1]}.{expert}.up_proj.weight", up


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """max |a - b| over all tensors, and the tensor it occurs in. The names must be the same."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    differences = {name: float((a[name].float() - b[name].float()).abs().max()) for name in a}
    worst = max(differences, key=lambda name: differences[name])
    return differences[worst], worst
