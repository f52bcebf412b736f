"""The FSDP2 trainer: Hugging Face models, parameters, gradients and AdamW states divided over all ranks.

Implements `miles.training.backend.TrainerBackend` for dense and MoE decoders; every rank is a data-parallel
rank. Master weights, gradients and optimizer states are float32; with train.dtype = "bfloat16" layers
compute in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from miles.config.schema import TrainSection
from miles.data.batch import MicroBatch
from miles.errors import TrainerError
from miles.models.checkpoint import write_model
from miles.training.backend import Layout, LossFunction, PendingSave, TokenOutputs, UpdateStats
from miles.training.distributed import choose_device
from miles.training.fsdp.model import build_policy_model, checkpoint_weights
from miles.training.fsdp.state import StateSaver, load_state


class FsdpBackend:
    """`TrainerBackend` on FSDP2. Needs the default process group; constructing it is collective."""

    def __init__(self, model_dir: Path, train: TrainSection, seed: int, *, trust_remote_code: bool = False) -> None:
        torch.manual_seed(seed)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.device = choose_device(train.device)
        self.layout = Layout(rank=rank, world_size=ranks, data_parallel_rank=rank, data_parallel_size=ranks)
        self._model_dir = model_dir
        self._train = train
        self._dtype: torch.dtype = getattr(torch, train.dtype)
        mesh = init_device_mesh(self.device.type, (ranks,))
        self._model = build_policy_model(model_dir, train, mesh, trust_remote_code=trust_remote_code)
        self._optimizer = _adamw(self._model, train)
        self._saver = StateSaver(self._model.causal_lm, self._optimizer)

    def log_probs(self, micro_batches: list[MicroBatch], temperature: float) -> list[TokenOutputs]:
        """As `TrainerBackend.log_probs`; the outputs lie on `device`."""
        outputs = []
        with torch.no_grad():
            for micro_batch in micro_batches:
                log_probs, entropy, _ = self._model(micro_batch.to(self.device), temperature)
                outputs.append(TokenOutputs(log_probs, entropy))
        # Without a backward pass nothing else gives the root's gathered parameters back.
        self._model.reshard()
        return outputs

    def update(
        self, micro_batches: list[MicroBatch], loss: LossFunction, *, lr: float, temperature: float
    ) -> UpdateStats:
        """As `TrainerBackend.update`.

        The router's balancing loss joins the gradient as the mean over micro-batches by tokens, times
        train.moe_aux_loss_coef; the reported loss does not contain it.
        """
        sums: dict[str, torch.Tensor] = {}
        balance_factors = self._balance_factors(micro_batches)
        for position, micro_batch in enumerate(micro_batches):
            self._model.set_requires_gradient_sync(position == len(micro_batches) - 1)
            on_device = micro_batch.to(self.device)
            log_probs, entropy, balance = self._model(on_device, temperature)
            result = loss(TokenOutputs(log_probs, entropy), on_device)
            (result.loss + balance_factors[position] * balance).backward()
            for name, value in {"loss": result.loss.detach(), **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        grad_norm = self._clip_gradient()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        totals = self._add_over_ranks(sums)
        return UpdateStats(loss=totals.pop("loss"), grad_norm=grad_norm, metrics=totals)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `TrainerBackend.named_weights`; one layer is whole at a time."""
        return checkpoint_weights(self._model, self._dtype)

    def save_hf(self, directory: Path) -> None:
        """As `TrainerBackend.save_hf`; rank 0 writes."""
        weights = self.named_weights()
        if self.layout.rank == 0:
            write_model(directory, weights, self._model_dir, self._dtype)
        else:
            for _ in weights:
                pass
        dist.barrier()

    def begin_save(self, directory: Path) -> PendingSave:
        """As `TrainerBackend.begin_save`; see `miles.training.sharded_files` for the files."""
        return self._saver.begin(directory)

    def load_state(self, directory: Path) -> None:
        """As `TrainerBackend.load_state`, from any number of ranks. Raises RunError for a state of another model."""
        load_state(directory, self._model.causal_lm, self._optimizer)

    def _balance_factors(self, micro_batches: list[MicroBatch]) -> list[float]:
        """Weight of each micro-batch's balancing loss: its share of all tokens times the coefficient."""
        if self._train.moe_aux_loss_coef == 0:
            return [0.0] * len(micro_batches)
        tokens = [0 if batch.is_dummy else batch.tokens.numel() for batch in micro_batches]
        total = torch.tensor(float(sum(tokens)), device=self.device)
        dist.all_reduce(total)
        return [self._train.moe_aux_loss_coef * count / total.item() for count in tokens]

    def _clip_gradient(self) -> float:
        """L2 norm of the whole gradient before clipping it to train.clip_grad; TrainerError if not finite."""
        parameters = list(self._model.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        value = norm.item()
        if not math.isfinite(value):
            raise TrainerError(
                f"the gradient's norm is {value}; the weights were left as they are",
                fix="lower train.lr, or look for absurd rewards or log-probabilities in the last samples",
            )
        if self._train.clip_grad > 0:
            clip_grads_with_norm_(parameters, self._train.clip_grad, norm)
        return value

    def _add_over_ranks(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        values = torch.stack(list(sums.values()))
        dist.all_reduce(values)
        return dict(zip(sums, values.tolist(), strict=True))


def _adamw(model: torch.nn.Module, train: TrainSection) -> torch.optim.AdamW:
    """AdamW that decays matrices only; vectors (norms, biases) are left alone, as in Megatron."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=train.lr,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
    )
