"""The state of the megatron trainer on disk: float32 master weights, AdamW's moments and its step count.

Owns what the state consists of and how it gets back into the trainer. megatron-core says which part of which whole
tensor each parameter is (`sharded_state_dict`), and its distributed optimizer which part of that a rank holds; both
together do not depend on the layout, so a state fits every layout of its model. Nothing is gathered: a rank writes what
it holds. The files are those of `miles.training.sharded_files`; beside them rank 0 writes `model.json`, what the state
is of. The weights of a bfloat16 model are the masters rounded.

megatron-core's own checkpoints of the optimizer are not used, for four reasons found with 0.16.1. Its `save` starts a
process that imports torch anew, only to collect results: seconds. Its fully reshardable format gathers the optimizer on
every rank, and pads with zeros what it miscounts where a parameter's size is no multiple of 64 (it warns of "data
corruption"). The number of parameter groups depends on the layout: experts have an optimizer of their own where expert
parallelism has. And torch's AdamW, which counts steps in a tensor for each parameter, gets one tensor for all on
loading, which every parameter then advances. Of the groups, the count of steps is all that is state; the
hyperparameters are the run file's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from miles.errors import RunError
from miles.models.mapping import Geometry
from miles.runs.files import write_new
from miles.training.distributed import raise_together
from miles.training.megatron.model import HiddenStatesModel
from miles.training.megatron.pieces import Piece, ReadingPlanner, WritingPlanner, boxes
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
"""Tensors are named as in megatron-core's own checkpoints: `optimizer.state.exp_avg.decoder...`."""
_STEP = f"{_OPTIMIZER}step"
_KINDS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Trainer:
    """What has the state, seen from one rank."""

    model: HiddenStatesModel
    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    geometry: Geometry
    data_group: dist.ProcessGroup
    """Ranks that hold the same dense weights."""


class StateSaver:
    """Begins saves of one trainer. Who writes what is agreed in the first one, and the same in all."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._layout: SaveLayout | None = None

    def begin(self, directory: Path) -> PendingState:
        """Copy this rank's part out. Collective. Nothing of the trainer is used after it."""
        pieces = [piece for replica, piece in _pieces(self._trainer) if not replica]
        copied = host_copies(piece.tensor for piece in pieces)
        copies = WritingPlanner([replace(piece, tensor=copy) for piece, copy in zip(pieces, copied, strict=True)])
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
    pieces = [piece for _, piece in _pieces(trainer)]
    require(directory, Wanted("megatron", _OPTIMIZER, _shapes(pieces)))
    try:
        dcp.load({}, storage_reader=dcp.FileSystemReader(directory), planner=ReadingPlanner(pieces))
    except CheckpointException as failure:
        raise first_cause(directory, failure) from failure
    [step] = [int(piece.tensor) for piece in pieces if piece.name == _STEP]
    for part in _parts(trainer.optimizer):
        _set_step(part.optimizer, step)
        part._copy_main_params_to_model_params()
    trainer.wrapped.start_param_sync()


def _pieces(trainer: Trainer) -> Iterator[tuple[bool, Piece]]:
    """This rank's part of the state, in the trainer's own memory, and whether another rank has the same. Collective."""
    step = torch.tensor([_steps_taken(trainer.optimizer)])
    yield dist.get_rank() != 0, Piece(_STEP, (1,), (0,), step)
    wholes = _wholes(trainer)
    for part in _parts(trainer.optimizer):
        _create_moments(part.optimizer)
        for parameter in part.model_param_gbuf_map:
            for whole in wholes[parameter]:
                yield from _held(trainer, part, parameter, whole)


def _wholes(trainer: Trainer) -> dict[torch.nn.Parameter, list[ShardedTensor]]:
    """The whole tensors that the parameters of this rank are parts of; some are parts of two, one after the other."""
    described = trainer.model.sharded_state_dict(metadata={"dp_cp_group": trainer.data_group})
    wholes = {}
    for entry in nested_values(described):
        if isinstance(entry, ShardedObject):
            # Of Transformer Engine's modules; they hold nothing without FP8.
            assert "_extra_state" in entry.key, entry.key
            continue
        wholes[entry.data] = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    return wholes


def _held(
    trainer: Trainer, part: DistributedOptimizer, parameter: torch.nn.Parameter, whole: ShardedTensor
) -> Iterator[tuple[bool, Piece]]:
    """What this rank's share of a parameter has of one of the whole tensors.

    All tensors are seen as rows of flat memory: the parameter, `whole.data` within it, the share within it.
    """
    share = part._get_model_param_range_map(parameter)["param"]
    states = part._get_main_param_and_optimizer_states(parameter)
    assert whole.data.is_contiguous()
    begin = whole.data.storage_offset() - parameter.storage_offset()
    shape, rows = tuple(whole.global_shape), whole.local_shape[0]
    if whole.allow_shape_mismatch:
        # A vocabulary, padded for its tensor ranks: the padding is no state.
        shape = (trainer.geometry.vocab_size, *shape[1:])
        rows = min(rows, max(0, shape[0] - whole.global_offset[0]))
    start = max(share.start, begin)
    stop = min(share.end, begin + rows * math.prod(whole.local_shape[1:]))
    # Which data-parallel rank has it is the optimizer's decision; tensor and pipeline ranks may have the same.
    replica = any(whole.replica_id[:2])
    stacked = whole.prepend_axis_num
    at = start - share.start
    for offset, size in boxes(tuple(whole.local_shape), start - begin, stop - begin):
        position = (0,) * stacked + offset
        place = tuple(a + b for a, b in zip(whole.global_offset, position, strict=True))
        for kind in _KINDS:
            values = states[kind].detach()[at : at + math.prod(size)].view((1,) * stacked + size)
            yield replica, Piece(f"{_OPTIMIZER}state.{kind}.{whole.key}", shape, place, values)
        at += math.prod(size)


def _parts(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    """The optimizers of dense parameters and of experts, where this pipeline stage has such parameters."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        assert isinstance(part, DistributedOptimizer)
        if not part.is_stub_optimizer:
            yield part


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
    for part in _parts(optimizer):
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


def _shapes(pieces: list[Piece]) -> dict[str, tuple[int, ...]]:
    """Of the whole tensors that all ranks together hold. Collective."""
    everyone: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, {piece.name: piece.whole for piece in pieces})
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
