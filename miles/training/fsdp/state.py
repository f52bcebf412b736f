"""The state of the FSDP2 trainer: float32 master weights and AdamW's moments and step counts, sharded.

Owns what the state consists of, its names, and copying it out and in; the files are those of
`miles.training.sharded_files`. Hyperparameters (learning rate, betas, decay) are not part of it: they are the run
file's.

The optimizer is read directly, not through `torch.distributed.checkpoint.state_dict`: that takes an empty step with an
optimizer that has no states yet, after which AdamW's bias correction is one step ahead of an uninterrupted run, and on
loading it would put the saved hyperparameters in place of the configured ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from miles.training.sharded_files import (
    PendingFiles,
    SaveLayout,
    Wanted,
    first_cause,
    host_copies,
    plan_save,
    require,
)

_WEIGHTS = "weights/"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"


class StateSaver:
    """Begins saves of one trainer. Who writes what is agreed in the first one, and the same in all."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._layout: SaveLayout | None = None

    def begin(self, directory: Path) -> PendingFiles:
        """Copy this rank's shards out. Collective the first time. Nothing of the trainer is used after it."""
        state = trainer_state(self._model, self._optimizer)
        if self._layout is None:
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
            self._layout = plan_save(planner)
        return PendingFiles(directory, self._layout, _Copies(state))


def load_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a state into the trainer, whatever number of ranks wrote it. Collective.

    Raises RunError, before anything is changed, where the state is another backend's or model's; RunError for files
    that are damaged and OSError as the disk does, after which the trainer is of no use.
    """
    state = trainer_state(model, optimizer)
    require(directory, Wanted("fsdp", _WEIGHTS, {name: tuple(tensor.shape) for name, tensor in state.items()}))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), planner=planner)
    except CheckpointException as failure:
        raise first_cause(directory, failure) from failure


def trainer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that an update changes, by name; tied parameters once. The tensors are the trainer's own.

    `weights/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` are sharded as the parameter is, `step/NAME` is a scalar.
    States that AdamW would make in its first step are made here, as it does.
    """
    state = {f"{_WEIGHTS}{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        states = optimizer.state[parameter]
        if not states:
            states[_STEP] = torch.zeros((), dtype=torch.float32)
            states.update({moment: torch.zeros_like(parameter) for moment in _MOMENTS})
        state.update({f"{kind}/{name}": states[kind] for kind in (*_MOMENTS, _STEP)})
    return state


class _Copies(DefaultSavePlanner):
    """This rank's shards in memory of their own on the host, where DCP's writer looks for them."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        shards = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in state.values())
        self._copies = dict(zip(state, host_copies(shards), strict=True))

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._copies[index.fqn]
