"""Weights between a Hugging Face directory and the ranks of a megatron-core model.

Owns the traffic: which rank reads which part, and how whole tensors come together again. What belongs where
is said by `miles.models.mapping`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from miles.models.checkpoint import CheckpointReader
from miles.models.mapping import (
    Geometry,
    Place,
    Weight,
    decoder_weights,
    fuse,
    rank_slice,
    tied_output_weight,
    unfuse,
)
from miles.training.megatron.layout import Axis, Grid


@dataclass(frozen=True, slots=True)
class ShardedWeights:
    """The weights of a model whose rank-local part is `parameters`."""

    parameters: dict[str, torch.nn.Parameter]
    geometry: Geometry
    grid: Grid
    fused_names: bool

    def load(self, reader: CheckpointReader) -> None:
        """Fill this rank's parameters; reads only what they hold."""
        missing = set(self.parameters)
        tensor = self.grid.tensor
        for weight in self._stored_weights():
            if self._owner(weight) != (self.grid.pipeline.rank, self._expert_rank(weight)):
                continue
            parts = [
                reader.read(name, shape, rank_slice(weight, shape, tensor.rank, tensor.size))
                for name, shape in zip(weight.hf, weight.shapes, strict=True)
            ]
            name = self._local_name(weight)
            parameter = self.parameters[name]
            with torch.no_grad():
                parameter.copy_(fuse(weight, parts, self.geometry, tensor.size))
            _mark(parameter, weight)
            missing.remove(name)
        assert not missing, f"not in the mapping: {sorted(missing)}"

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors under their checkpoint names on every rank, one parameter at a time. Collective.

        A tensor may share the model's memory: copy what is kept.
        """
        for weight in decoder_weights(self.geometry, fused_names=self.fused_names):
            stage, expert_rank = self._owner(weight)
            wholes: list[torch.Tensor] | None = None
            if self.grid.pipeline.rank == stage:
                if self._expert_rank(weight) == expert_rank:
                    wholes = self._merge(weight, self.parameters[self._local_name(weight)])
                if weight.expert is not None:
                    wholes = self._broadcast(weight, wholes, self.grid.expert, expert_rank)
            wholes = self._broadcast(weight, wholes, self.grid.pipeline, stage)
            yield from zip(weight.hf, wholes, strict=True)

    def _merge(self, weight: Weight, local: torch.Tensor) -> list[torch.Tensor]:
        """The whole checkpoint tensors of this stage's weight."""
        local, tensor = local.detach().contiguous(), self.grid.tensor
        if weight.split is None or tensor.size == 1:
            return unfuse(weight, [local], self.geometry)
        shards = [torch.empty_like(local) for _ in range(tensor.size)]
        dist.all_gather(shards, local, group=tensor.group)
        return unfuse(weight, shards, self.geometry)

    def _broadcast(
        self, weight: Weight, wholes: list[torch.Tensor] | None, axis: Axis, source: int
    ) -> list[torch.Tensor]:
        """`wholes` of the axis' rank `source`, on all of its ranks."""
        if axis.size > 1:
            if wholes is None:
                like = next(iter(self.parameters.values()))
                wholes = [torch.empty(shape, dtype=like.dtype, device=like.device) for shape in weight.shapes]
            wholes = [whole.contiguous() for whole in wholes]
            for whole in wholes:
                dist.broadcast(whole, group=axis.group, group_src=source)
        assert wholes is not None
        return wholes

    def _stored_weights(self) -> Iterator[Weight]:
        yield from decoder_weights(self.geometry, fused_names=self.fused_names)
        if self.geometry.tied and self.grid.pipeline.size > 1:
            yield tied_output_weight(self.geometry)

    def _owner(self, weight: Weight) -> tuple[int, int]:
        """Pipeline and expert rank that hold a weight; expert rank 0 where it is not an expert's."""
        stages = {Place.FIRST: 0, Place.LAST: self.grid.pipeline.size - 1}
        stage = stages.get(weight.place, weight.layer // self._layers_per_stage)
        return stage, 0 if weight.expert is None else weight.expert // self._experts_per_rank

    def _expert_rank(self, weight: Weight) -> int:
        """This rank's answer to the second part of `_owner`."""
        return 0 if weight.expert is None else self.grid.expert.rank

    def _local_name(self, weight: Weight) -> str:
        first_layer = self.grid.pipeline.rank * self._layers_per_stage
        return weight.local_name(first_layer, self.grid.expert.rank * self._experts_per_rank)

    @property
    def _layers_per_stage(self) -> int:
        return self.geometry.layers // self.grid.pipeline.size

    @property
    def _experts_per_rank(self) -> int:
        return self.geometry.experts // self.grid.expert.size


def _mark(parameter: torch.nn.Parameter, weight: Weight) -> None:
    """Tell megatron-core over which ranks a gradient is summed and its norm counted.

    It sets these marks itself, but the first only on parameters that it initializes (others count as copies
    of tensor rank 0's in the norm), and the second only with expert parallelism: without, experts would not
    be summed over the tensor ranks, each of which routes other tokens to them.
    """
    vars(parameter)["tensor_model_parallel"] = weight.split is not None or weight.expert is not None
    vars(parameter)["allreduce"] = weight.expert is None
