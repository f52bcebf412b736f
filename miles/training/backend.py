"""The protocol behind which both trainer backends stand, and the values that cross it.

Owns no implementation: `miles.training.megatron` and `miles.training.fsdp` do. `miles.training.loop` speaks only
this protocol. Every method is collective: all ranks call it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from miles.data.batch import MicroBatch


@dataclass(frozen=True, slots=True)
class Layout:
    """Where this rank stands. Ranks that differ only in tensor or pipeline rank see the same data."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int


@dataclass(frozen=True, slots=True)
class TokenOutputs:
    """What the loss sees of the model, both float32 [T], aligned as in `miles.data.batch`; 0 at sequence starts."""

    log_probs: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A weighted *sum* over the micro-batch, and metrics that are sums as well (detached scalars)."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


LossFunction = Callable[[TokenOutputs, MicroBatch], LossOutput]


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Result of one optimizer update, the same on every rank."""

    loss: float
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    metrics: dict[str, float]
    """Sums over all micro-batches and data-parallel ranks of what the loss function reported."""


class PendingSave(Protocol):
    """State that is copied out of the trainer and not yet on disk."""

    def write(self) -> None:
        """Write this rank's files. Runs in a background thread while the trainer goes on: no collective operation of
        the default process group, and nothing that the trainer changes. Raises OSError as the disk does.
        """
        ...

    def finalize(self) -> None:
        """Complete the save after every rank's `write` has returned. Collective, in the main thread, quick."""
        ...


class TrainerBackend(Protocol):
    """A model with an optimizer, spread over the ranks of the default process group."""

    layout: Layout
    device: torch.device

    def log_probs(self, micro_batches: list[MicroBatch], temperature: float) -> list[TokenOutputs]:
        """Log-probability and entropy of every token, no gradient; on every rank, for its own micro-batches."""
        ...

    def update(
        self, micro_batches: list[MicroBatch], loss: LossFunction, *, lr: float, temperature: float
    ) -> UpdateStats:
        """Accumulate the gradient of all micro-batches, reduce it, clip it, and take one optimizer step."""
        ...

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights under their Hugging Face checkpoint names, whole, in the training dtype; on every rank.

        Experts come one tensor each (`...experts.3.gate_proj.weight`). Tied weights come once.
        """
        ...

    def save_hf(self, directory: Path) -> None:
        """Write a Hugging Face model directory (weights, config, tokenizer) that `from_pretrained` opens."""
        ...

    def begin_save(self, directory: Path) -> PendingSave:
        """Copy weights, optimizer states and whatever else an update depends on, to be written into `directory`.

        Collective; `directory` exists and all ranks see it. Returns as soon as the trainer may change its state again.
        """
        ...

    def load_state(self, directory: Path) -> None:
        """Take over a state that `begin_save` wrote, under this or any other layout of this backend. Collective."""
        ...
