"""`MegatronBackend`: the trainer protocol on megatron-core.

Owns the step: forward and backward through megatron-core's pipeline schedule, the distributed optimizer, and
what the ranks tell each other about it. Building the model, moving weights and the CPU's peculiarities have
their own files here. Token outputs and losses are shared with the other backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from transformers import AutoConfig

from miles.config.schema import TrainSection
from miles.data.batch import MicroBatch
from miles.errors import ConfigError, TrainerError
from miles.models.checkpoint import CheckpointReader, write_model
from miles.models.mapping import check_layout, geometry_of
from miles.training.backend import Layout, LossFunction, TokenOutputs, UpdateStats
from miles.training.distributed import choose_device
from miles.training.megatron.cpu import cpu_megatron
from miles.training.megatron.layout import create_grid
from miles.training.megatron.model import HiddenStatesModel, build_model, uses_transformer_engine
from miles.training.megatron.state import PendingState, StateSaver, Trainer, load_state
from miles.training.megatron.weights import ShardedWeights
from miles.training.token_outputs import token_outputs

Consumer = Callable[[TokenOutputs, MicroBatch], tuple[torch.Tensor, Any]]
"""What becomes of a micro-batch's outputs on the last stage: a loss, and anything to keep."""


class MegatronBackend:
    """A model with its optimizer over tensor-, pipeline-, expert- and data-parallel ranks.

    The optimizer and the gradient buffers come into being at the first update: a reference model has none.
    """

    layout: Layout
    device: torch.device

    def __init__(self, model_dir: Path, train: TrainSection, seed: int) -> None:
        """Load the Hugging Face model in `model_dir`. Collective; the default process group must exist.

        `seed` is for megatron-core's generators, which these models (no dropout, weights from files) never draw from.
        """
        self.device = choose_device(train.device)
        self._model_dir = model_dir
        self._train = train
        self._dtype: torch.dtype = getattr(torch, train.dtype.value)
        config = AutoConfig.from_pretrained(model_dir)
        geometry = geometry_of(config)
        check_layout(
            geometry,
            tensor=train.tensor_parallel_size,
            pipeline=train.pipeline_parallel_size,
            expert=train.expert_parallel_size,
            world_size=dist.get_world_size(),
        )
        if train.moe_aux_loss_coef > 0 and not geometry.experts:
            raise ConfigError(
                f"train.moe_aux_loss_coef = {train.moe_aux_loss_coef}, but {config.model_type} has no experts",
                fix="set it to 0",
            )
        with self._platform():
            self._grid = create_grid(train)
            if self.device.type == "cuda":
                model_parallel_cuda_manual_seed(seed)
            self._model = build_model(config, geometry, train, self._grid, self.device, self._dtype)
        self._weights = ShardedWeights(
            parameters=dict(self._model.named_parameters()),
            geometry=geometry,
            grid=self._grid,
            fused_names=uses_transformer_engine(self.device, self._dtype),
        )
        with CheckpointReader(model_dir) as reader:
            self._weights.load(reader)
        self.layout = self._grid.layout

    def log_probs(self, micro_batches: list[MicroBatch], temperature: float) -> list[TokenOutputs]:
        """As `TrainerBackend.log_probs`; the outputs lie on `device`."""

        def keep(outputs: TokenOutputs, micro_batch: MicroBatch) -> tuple[torch.Tensor, TokenOutputs]:
            return outputs.log_probs.new_zeros(()), outputs

        with self._platform(), torch.no_grad():
            kept = self._run(self._model, micro_batches, keep, temperature, forward_only=True)
            return [
                self._from_last_stage(micro_batch, outputs)
                for micro_batch, outputs in zip(micro_batches, kept or [None] * len(micro_batches), strict=True)
            ]

    def update(
        self, micro_batches: list[MicroBatch], loss: LossFunction, *, lr: float, temperature: float
    ) -> UpdateStats:
        """As `TrainerBackend.update`; `TrainerError` and unchanged weights where the gradient is not finite.

        The routers' balancing loss joins the gradient as the mean over micro-batches by tokens (those of dummies
        included), times train.moe_aux_loss_coef; the reported loss does not contain it.
        """
        with self._platform():
            sums = self._accumulate(micro_batches, loss, temperature)
            grad_norm = self._step(lr)
        return UpdateStats(loss=sums.pop("loss"), grad_norm=grad_norm, metrics=sums)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `TrainerBackend.named_weights`; one parameter is whole at a time. Copy what is kept."""
        return self._weights.export()

    def save_hf(self, directory: Path) -> None:
        """As `TrainerBackend.save_hf`; rank 0 writes."""
        if self.layout.rank == 0:
            write_model(directory, self.named_weights(), self._model_dir, self._dtype)
        else:
            for _ in self.named_weights():
                pass
        dist.barrier()

    def begin_save(self, directory: Path) -> PendingState:
        """As `TrainerBackend.begin_save`; see `miles.training.megatron.state` for the files."""
        with self._platform():
            return self._saver.begin(directory)

    def load_state(self, directory: Path) -> None:
        """As `TrainerBackend.load_state`, from any layout. Raises RunError for a state of another model."""
        with self._platform():
            load_state(directory, self._trainer)

    @cached_property
    def _saver(self) -> StateSaver:
        return StateSaver(self._trainer)

    @property
    def _trainer(self) -> Trainer:
        trainable = self._trainable
        return Trainer(
            model=self._model,
            wrapped=trainable.model,
            optimizer=trainable.optimizer,
            geometry=self._weights.geometry,
            data_group=self._grid.data.group,
        )

    @cached_property
    def _trainable(self) -> _Trainable:
        return _Trainable.of(self._model, self._train)

    def _platform(self) -> AbstractContextManager[None]:
        return cpu_megatron() if self.device.type == "cpu" else nullcontext()

    def _accumulate(self, micro_batches: list[MicroBatch], loss: LossFunction, temperature: float) -> dict[str, float]:
        """Gradients into the buffers, reduced; returns the sums of loss and metrics, the same on every rank."""
        scale = self._balance_scale(micro_batches)

        def weigh(outputs: TokenOutputs, micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            result = loss(outputs, micro_batch)
            return result.loss / scale, {"loss": result.loss.detach(), **result.metrics}

        trainable = self._trainable
        trainable.model.zero_grad_buffer()
        trainable.optimizer.zero_grad()
        self._model.config.grad_scale_func = lambda value: value * scale
        return self._sum(self._run(trainable.model, micro_batches, weigh, temperature))

    def _balance_scale(self, micro_batches: list[MicroBatch]) -> float:
        """The factor that makes the routers' balancing loss a mean over tokens.

        megatron-core multiplies that loss of a micro-batch by its tokens on this rank, which sequence parallelism
        has divided. It has one factor for this loss and the main one, so the main one is divided by it before.
        """
        if self._train.moe_aux_loss_coef == 0:
            return 1.0
        total = torch.tensor(float(sum(len(batch.tokens) for batch in micro_batches)), device=self.device)
        dist.all_reduce(total, group=self._grid.data.group)
        return self._grid.tensor.size / total.item()

    def _step(self, lr: float) -> float:
        """One optimizer step; returns the gradient's norm before clipping."""
        optimizer = self._trainable.optimizer
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise TrainerError(
                f"the gradient's norm is {norm}; the weights were left as they are",
                fix="lower train.lr, or look for absurd rewards or log-probabilities in the last samples",
            )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        return norm

    def _run(
        self,
        model: torch.nn.Module,
        micro_batches: list[MicroBatch],
        consume: Consumer,
        temperature: float,
        **schedule: Any,
    ) -> list[Any]:
        """Run all micro-batches through the stages; what `consume` keeps, on the last stage, else nothing."""

        def forward(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            micro_batch = next(batches).to(self.device)
            hidden = model(**model_inputs(micro_batch, self._grid.tensor.size))
            return hidden, partial(consume_hidden, micro_batch)

        def consume_hidden(micro_batch: MicroBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            outputs = self._token_outputs(hidden, micro_batch, temperature)
            loss, kept = consume(outputs, micro_batch)
            return loss, torch.zeros((), dtype=torch.int, device=self.device), kept

        run = get_forward_backward_func()
        kept: list[Any] = run(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=max(len(micro_batch.tokens) for micro_batch in micro_batches),
            micro_batch_size=1,
            **schedule,
        )
        return kept

    def _token_outputs(self, hidden: torch.Tensor, micro_batch: MicroBatch, temperature: float) -> TokenOutputs:
        return token_outputs(
            hidden[: len(micro_batch.tokens), 0],
            self._model.output_weight,
            micro_batch,
            temperature=temperature,
            chunk_tokens=self._train.log_prob_chunk_tokens,
            group=self._grid.tensor.group if self._grid.tensor.size > 1 else None,
            vocab_size=self._weights.geometry.vocab_size,
        )

    def _from_last_stage(self, micro_batch: MicroBatch, outputs: TokenOutputs | None) -> TokenOutputs:
        """The last stage's outputs, on every stage."""
        pipeline = self._grid.pipeline
        if pipeline.size == 1:
            assert outputs is not None
            return outputs
        shape = (2, len(micro_batch.tokens))
        if outputs is None:
            both = torch.empty(shape, dtype=torch.float32, device=self.device)
        else:
            both = torch.stack([outputs.log_probs, outputs.entropy])
        dist.broadcast(both, group=pipeline.group, group_src=pipeline.size - 1)
        return TokenOutputs(log_probs=both[0], entropy=both[1])

    def _sum(self, kept: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums by name over the micro-batches and data-parallel ranks, from the last stage to every rank."""
        box: list[dict[str, float] | None] = [None]
        if self._grid.last_stage:
            names = sorted(kept[0])
            totals = torch.stack([torch.stack([entry[name].double() for entry in kept]).sum() for name in names])
            dist.all_reduce(totals, group=self._grid.data.group)
            box = [dict(zip(names, totals.tolist(), strict=True))]
        pipeline = self._grid.pipeline
        dist.broadcast_object_list(box, group=pipeline.group, group_src=pipeline.size - 1)
        assert box[0] is not None
        return box[0]


@dataclass(frozen=True, slots=True)
class _Trainable:
    """The model with gradient buffers and the distributed optimizer over them."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer

    @classmethod
    def of(cls, model: HiddenStatesModel, train: TrainSection) -> _Trainable:
        """Gradients are summed in float32; each data-parallel rank keeps the Adam states of its share."""
        buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        wrapped = DistributedDataParallel(model.config, buffers, model)
        model.config.finalize_model_grads_func = _reduce_gradients
        settings = OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            clip_grad=train.clip_grad,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
        )
        optimizer = get_megatron_optimizer(settings, [wrapped])
        for group in optimizer.param_groups:
            # Norms and biases are not decayed.
            group["weight_decay"] = train.weight_decay * group["wd_mult"]
        return cls(wrapped, optimizer)


def _reduce_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None, **groups: Any) -> None:
    """megatron-core's reduction without its division by the number of tokens: the weights contain it."""
    finalize_model_grads(model, None, **groups)


def model_inputs(micro_batch: MicroBatch, multiple: int) -> dict[str, Any]:
    """Arguments of `GPTModel.forward` for a packed micro-batch.

    Sequence parallelism divides the tokens over `multiple` ranks; a dummy sequence makes them divisible.
    """
    missing = -len(micro_batch.tokens) % multiple
    tokens, positions, offsets = micro_batch.tokens, micro_batch.position_ids, micro_batch.cu_seqlens
    if missing:
        tokens = torch.cat([tokens, tokens.new_zeros(missing)])
        positions = torch.cat([positions, torch.arange(missing, device=positions.device)])
        offsets = torch.cat([offsets, offsets[-1:] + missing])
    # The true maximum: rotary embeddings take a maximum that equals the number of tokens for another layout.
    longest = max(micro_batch.max_length, missing)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return {
        "input_ids": tokens[None],
        "position_ids": positions[None],
        "attention_mask": None,
        "packed_seq_params": packed,
    }
