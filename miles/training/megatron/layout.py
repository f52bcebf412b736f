"""megatron-core's process groups, and where this rank stands in them.

Owns their creation and nothing that runs on them. The default process group must exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from miles.config.schema import TrainSection
from miles.training.backend import Layout

EXPERT_TENSOR_PARALLEL_SIZE = 1
"""Experts are divided by number only: their matrices are small, and no rank pads them."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of the grid of ranks."""

    group: dist.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The dimensions in which ranks differ. Ranks that differ in `data` only hold the same dense weights."""

    tensor: Axis
    pipeline: Axis
    expert: Axis
    data: Axis

    @property
    def first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def layout(self) -> Layout:
        return Layout(dist.get_rank(), dist.get_world_size(), self.data.rank, self.data.size)


def create_grid(train: TrainSection) -> Grid:
    """The grid of `train`'s parallel sizes. Collective.

    megatron-core keeps its groups per process, so every model of a process has the same grid.
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=train.tensor_parallel_size,
            pipeline_model_parallel_size=train.pipeline_parallel_size,
            expert_model_parallel_size=train.expert_parallel_size,
            expert_tensor_parallel_size=EXPERT_TENSOR_PARALLEL_SIZE,
        )
    grid = Grid(
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        expert=_axis(parallel_state.get_expert_model_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
    )
    sizes = (grid.tensor.size, grid.pipeline.size, grid.expert.size)
    assert sizes == (train.tensor_parallel_size, train.pipeline_parallel_size, train.expert_parallel_size)
    return grid


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group, group.rank(), group.size())
