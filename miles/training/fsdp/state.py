"""The state of the FSDP2 trainer on disk: float32 master weights and AdamW's moments and step counts, sharded.

Owns names, copying out, and what is refused on loading. Files, plans and resharding are torch.distributed.checkpoint's
(DCP): rank r writes `__{r}_0.distcp` in `write`, rank 0 writes `.metadata` in `finalize`; nothing touches the disk
before. Hyperparameters (learning rate, betas, decay) are not part of the state: they are the run file's.

The optimizer is read directly, not through DCP's `get_optimizer_state_dict`: that takes an empty step with an optimizer
that has no states yet, after which AdamW's bias correction is one step ahead of an uninterrupted run, and on loading it
would put the saved hyperparameters in place of the configured ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from miles.errors import RunError
from miles.training.distributed import raise_together

T = TypeVar("T")

WEIGHTS = "weights/"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"


@dataclass(frozen=True, slots=True)
class SaveLayout:
    """Who writes which part of which tensor: the same in every save of a trainer."""

    mine: SavePlan
    whole: Metadata | None
    """Of all tensors; on rank 0."""


class PendingState:
    """As `PendingSave`: host copies of this rank's shards on their way to the disk."""

    def __init__(self, directory: Path, state: dict[str, torch.Tensor], layout: SaveLayout) -> None:
        """Copies; nothing of `state` is used afterwards."""
        self._copies = _Copies(state)
        self._layout = layout
        self._writer = _writer(directory)
        self._results: list[WriteResult] = []

    def write(self) -> None:
        """Write and fsync this rank's file. Raises OSError."""
        try:
            self._results = self._writer.write_data(self._layout.mine, self._copies).wait()
        except RuntimeError as error:
            # torch.save closes its half-written record and raises about that, after what the disk said.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def finalize(self) -> None:
        """Write `.metadata`, which says where each part of each tensor is. Raises OSError, on every rank."""
        results = _gather(self._results)
        error = None
        if results is not None:
            assert self._layout.whole is not None
            try:
                self._writer.finish(replace(self._layout.whole), results)
            except OSError as refused:
                error = refused
        raise_together(error)


def plan_save(state: dict[str, torch.Tensor]) -> SaveLayout:
    """Divide the writing of `state` among the ranks: shards by their owners, scalars evenly. Collective."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
    plans = _gather(planner.create_local_plan())
    parts: list[SavePlan] | None = None
    whole = None
    if plans is not None:
        parts, whole = planner.create_global_plan(plans)
        parts = _writer(Path()).prepare_global_plan(parts)  # names the files
    mine: list[SavePlan | None] = [None]
    dist.scatter_object_list(mine, parts, src=0)
    assert mine[0] is not None
    return SaveLayout(mine[0], whole)


def trainer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that an update changes, by name; tied parameters once. The tensors are the trainer's own.

    `weights/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` are sharded as the parameter is, `step/NAME` is a scalar.
    States that AdamW would make in its first step are made here, as it does.
    """
    state = {f"{WEIGHTS}{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        states = optimizer.state[parameter]
        if not states:
            states[_STEP] = torch.zeros((), dtype=torch.float32)
            states.update({moment: torch.zeros_like(parameter) for moment in _MOMENTS})
        state.update({f"{kind}/{name}": states[kind] for kind in (*_MOMENTS, _STEP)})
    return state


def load_state(directory: Path, state: dict[str, torch.Tensor]) -> None:
    """Read the tensors of `state` in place, whatever number of ranks wrote them. Collective.

    Raises RunError, before anything is changed, where the names or shapes on disk are others; RunError for files that
    are damaged and OSError as the disk does, after which the trainer is of no use.
    """
    error: RunError | OSError | None = None
    if dist.get_rank() == 0:
        try:
            error = difference(directory, _read_metadata(directory), state)
        except (RunError, OSError) as refused:
            error = refused
    raise_together(error)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), planner=planner)
    except CheckpointException as failure:
        raise _first_cause(directory, failure) from failure


def difference(directory: Path, saved: Metadata, state: dict[str, torch.Tensor]) -> RunError | None:
    """What stands against loading: states of another backend or model, named; None when nothing does."""
    there = {
        name: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in saved.state_dict_metadata.items()
    }
    here = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if not any(name.startswith(WEIGHTS) for name in there):
        return RunError(
            f"{directory} holds no state of the fsdp backend",
            fix="set train.backend to the one that wrote it, or begin a new run",
        )
    parts = [
        _named("it lacks", [name for name in here if name not in there]),
        _named("the model does not have", [name for name in there if name not in here]),
        _named(
            "of another shape are",
            [
                f"{name} ({there[name]}, here {here[name]})"
                for name in here
                if there.get(name, here[name]) != here[name]
            ],
        ),
    ]
    problems = "; ".join(part for part in parts if part)
    if not problems:
        return None
    return RunError(
        f"{directory} is the state of another model: {problems}",
        fix="resume with the model that the run began with (model.path), or begin a new run",
    )


class _Copies(DefaultSavePlanner):
    """This rank's shards in memory of their own on the host, where DCP's writer looks for them."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies = {}
        for name, tensor in state.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            self._copies[name] = copy.copy_(local, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._copies[index.fqn]


def _writer(directory: Path) -> dcp.FileSystemWriter:
    # Copying ahead, for tensors on a GPU, would make the writing thread wait for the trainer's stream.
    writer = dcp.FileSystemWriter(directory, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(dist.get_rank() == 0, rank=dist.get_rank())
    return writer


def _read_metadata(directory: Path) -> Metadata:
    try:
        return dcp.FileSystemReader(directory).read_metadata()
    except FileNotFoundError as error:
        raise RunError(
            f"{directory} holds no trainer state: .metadata is missing",
            fix="resume from another checkpoint, or begin a new run",
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise _damaged(directory, error) from error


def _first_cause(directory: Path, failure: CheckpointException) -> OSError | RunError:
    """The error behind DCP's report of all ranks: the disk's own where there is one."""
    causes = [cause for cause, _ in failure.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), _damaged(directory, causes[0]))


def _damaged(directory: Path, error: BaseException) -> RunError:
    return RunError(
        f"the trainer state in {directory} cannot be read: {type(error).__name__}: {error}",
        fix="the files are damaged or of another version of PyTorch: resume from another checkpoint",
    )


def _named(what: str, names: list[str]) -> str:
    """`it lacks 12 tensors (the first: a, b, c)`; empty when there are none."""
    if not names:
        return ""
    return f"{what} {len(names)} tensor{'s' * (len(names) > 1)} (first: {', '.join(names[:3])})"


def _gather(value: T) -> list[T] | None:
    """Everybody's value, by rank, on rank 0."""
    everyone: list[T] | None = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, everyone, dst=0)
    return everyone
