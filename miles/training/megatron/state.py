"""The state of the megatron trainer on disk: weights, float32 master weights, AdamW's moments and its step count.

Owns what the state consists of and how it gets back into the trainer. megatron-core says which part of which whole
tensor a rank holds (`sharded_state_dict`), so a state fits every layout of its model. The files are those of
`miles.training.sharded_files`; beside them rank 0 writes `model.json`, what the state is of.

megatron-core's own `save` and `load` are not used. `save` starts a process that imports torch anew, only to collect
results (seconds). Both carry the optimizer's parameter groups, whose number depends on the layout (experts have an
optimizer of their own where expert parallelism has) and whose hyperparameters are the run file's. What is state in them
is the count of steps, one for the whole trainer; torch's AdamW has it in a tensor for each parameter, and megatron-core
would make them a single one on loading, which every parameter then advances.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from miles.errors import RunError
from miles.models.mapping import Geometry
from miles.runs.files import write_new
from miles.training.distributed import raise_together
from miles.training.megatron.model import HiddenStatesModel
from miles.training.sharded_files import (
    PendingFiles,
    SaveLayout,
    Wanted,
    another_model,
    damaged,
    first_cause,
    host_copies,
    plan_save,
    require,
)

_MODEL_FILE = "model.json"
_OPTIMIZER = "optimizer."
"""How the names of the optimizer's tensors begin, megatron-core's and ours."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """What has the state, seen from one rank."""

    model: HiddenStatesModel
    optimizer: MegatronOptimizer
    geometry: Geometry
    data_group: dist.ProcessGroup
    """Ranks that hold the same dense weights."""


class StateSaver:
    """Begins saves of one trainer. Who writes what is agreed in the first one, and the same in all.

    Ranks that hold the same tensors share the writing. To divide them, each rank has the optimizer states of its whole
    data-parallel group in host memory for a moment: 12 bytes for each parameter of its part of the model.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._layout: SaveLayout | None = None
        self._sharing = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1), trainer.data_group, do_cache_distribution=True
        )

    def begin(self, directory: Path) -> PendingState:
        """Copy this rank's part out. Collective. Nothing of the trainer is used after it."""
        first = self._layout is None
        sharded, _ = save_preprocess(_tensors(self._trainer, loading=False), validate_access_integrity=first)
        self._sharing.apply_saving_parallelization(sharded)
        copies = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        copies.set_up_planner(mcore_to_pyt_state_dict(_copied(sharded)), is_coordinator=dist.get_rank() == 0)
        if self._layout is None:
            self._layout = plan_save(copies)
        return PendingState(PendingFiles(directory, self._layout, copies), directory, _describe(self._trainer))


@dataclass(frozen=True, slots=True)
class PendingState:
    """As `PendingSave`: host copies of what this rank writes."""

    files: PendingFiles
    directory: Path
    description: dict[str, Any]

    def write(self) -> None:
        """Write and fsync this rank's files. Raises OSError."""
        if dist.get_rank() == 0:
            write_new(self.directory / _MODEL_FILE, json.dumps(self.description, indent=2) + "\n")
        self.files.write()

    def finalize(self) -> None:
        """Write `.metadata`. Raises OSError, on every rank."""
        self.files.finalize()


def load_state(directory: Path, trainer: Trainer) -> None:
    """Put a state into the trainer, whatever layout wrote it. Collective.

    Raises RunError, before anything is changed, where the state is another backend's or model's; RunError for files
    that are damaged and OSError as the disk does, after which the trainer is of no use.
    """
    _require_model(directory, _describe(trainer))
    room, _, factories = load_preprocess(_tensors(trainer, loading=True))
    require(directory, Wanted("megatron", _OPTIMIZER, _shapes(room)))
    try:
        loaded = TorchDistLoadShardedStrategy().load(room, directory)
    except CheckpointException as failure:
        raise first_cause(directory, failure) from failure
    loaded = apply_factory_merges(loaded, factories)
    unmatched = trainer.model.load_state_dict(loaded["model"], strict=False)
    assert not unmatched.unexpected_keys
    assert all(name.endswith("_extra_state") for name in unmatched.missing_keys)
    for index, part in _parts(trainer.optimizer):
        for states in part.optimizer.state.values():
            # megatron-core would look for it among the loaded tensors.
            states.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(loaded["optimizer"][index])
        _set_step(part.optimizer, int(loaded["step"]))


def _copied(sharded: dict[str, Any]) -> dict[str, list[ShardedTensor]]:
    """What this rank writes, by the names of the whole tensors, with data of its own on the host."""
    tensors = [tensor for tensor in nested_values(sharded) if is_main_replica(tensor.replica_id)]
    by_name: dict[str, list[ShardedTensor]] = {}
    for tensor, copy in zip(tensors, host_copies(tensor.data for tensor in tensors), strict=True):
        tensor.data = copy
        by_name.setdefault(tensor.key, []).append(tensor)
    return by_name


def _tensors(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    """megatron-core's description of this rank's tensors, with data or, for loading, room for it. Collective."""
    for _, part in _parts(trainer.optimizer):
        _create_moments(part.optimizer)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "dp_cp_group": trainer.data_group,
    }
    # Transformer Engine's extra states hold nothing without FP8, and other modules than its own have none.
    extra, weights = extract_matching_values(
        trainer.model.sharded_state_dict(metadata=metadata), lambda value: isinstance(value, ShardedObject)
    )
    assert all(name.endswith("_extra_state") for name in extra), sorted(extra)
    step = torch.tensor([_steps_taken(trainer.optimizer)])
    return {
        "model": weights,
        "optimizer": {
            index: part.sharded_param_state_fully_reshardable(weights, loading, metadata)
            for index, part in _parts(trainer.optimizer)
        },
        "step": ShardedTensor.from_rank_offsets(f"{_OPTIMIZER}step", step, replica_id=dist.get_rank()),
    }


def _parts(optimizer: MegatronOptimizer) -> Iterator[tuple[int, DistributedOptimizer]]:
    """The optimizers of dense parameters and of experts, where this pipeline stage has such parameters."""
    for index, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        assert isinstance(part, DistributedOptimizer)
        if not part.is_stub_optimizer:
            yield index, part


def _create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the states of an optimizer that has not stepped, as its first step would."""
    fresh = [parameter for parameter in _parameters(optimizer) if not optimizer.state[parameter]]
    for parameter in fresh:
        optimizer.state[parameter].update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})
    if fresh:
        _set_step(optimizer, 0)


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """torch's AdamW counts for each parameter, Transformer Engine's for each group."""
    if _counts_by_parameter(optimizer):
        for parameter in _parameters(optimizer):
            optimizer.state[parameter]["step"] = torch.tensor(float(step))
    else:
        for group in optimizer.param_groups:
            group["step"] = step


def _steps_taken(optimizer: MegatronOptimizer) -> int:
    """The count of steps. Collective: a rank without a share of the parameters has none of its own."""
    counts = {0}
    for _, part in _parts(optimizer):
        inner = part.optimizer
        holders = inner.state.values() if _counts_by_parameter(inner) else inner.param_groups
        counts |= {int(holder["step"]) for holder in holders if "step" in holder}
    most = torch.tensor(max(counts))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _shapes(room: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Of whole tensors, on all ranks; None for a vocabulary, whose padding depends on the layout. Collective."""
    mine = {
        tensor.key: None if tensor.allow_shape_mismatch else tuple(tensor.global_shape)
        for tensor in nested_values(room)
    }
    everyone: list[dict[str, tuple[int, ...] | None]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: shape for shapes in everyone for name, shape in shapes.items()}


def _describe(trainer: Trainer) -> dict[str, Any]:
    """What a state must have in common with the trainer that loads it, as JSON gives it back."""
    description = {"dtype": str(trainer.model.config.params_dtype).removeprefix("torch."), **asdict(trainer.geometry)}
    values: dict[str, Any] = json.loads(json.dumps(description))
    return values


def _require_model(directory: Path, here: dict[str, Any]) -> None:
    """Raise RunError on every rank where the state is of something else. Collective; rank 0 reads."""
    error: RunError | OSError | None = None
    if dist.get_rank() == 0:
        try:
            error = _difference(directory, json.loads((directory / _MODEL_FILE).read_text()), here)
        except FileNotFoundError:
            error = RunError(
                f"{directory} holds no state of the megatron backend: {_MODEL_FILE} is missing",
                fix="set train.backend to the one that wrote it, or resume from another checkpoint",
            )
        except ValueError as refused:
            error = damaged(directory, refused)
        except OSError as refused:
            error = refused
    raise_together(error)


def _difference(directory: Path, there: dict[str, Any], here: dict[str, Any]) -> RunError | None:
    problems = [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    return another_model(directory, "; ".join(problems)) if problems else None
