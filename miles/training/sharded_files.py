"""The files of a trainer's sharded state, which torch.distributed.checkpoint (DCP) plans, writes and reads.

Owns planning, writing in a background thread, and what is refused before anything is loaded; what the state consists of
is each backend's. Rank r writes `__{r}_0.distcp` in `write`, rank 0 writes `.metadata`, which says where each part of
each tensor is, in `finalize`. Nothing touches the disk before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from miles.errors import RunError
from miles.training.distributed import raise_together


@dataclass(frozen=True, slots=True)
class SaveLayout:
    """Who writes which part of which tensor: the same in every save of a trainer."""

    mine: SavePlan
    whole: Metadata | None
    """Of all tensors; on rank 0."""


class PendingFiles:
    """As `PendingSave`: copies on their way to the disk."""

    def __init__(self, directory: Path, layout: SaveLayout, copies: SavePlanner) -> None:
        """`copies` gives out tensors that nobody changes any more."""
        self._layout = layout
        self._copies = copies
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
        """Write `.metadata`. Raises OSError, on every rank."""
        results = _gather(self._results)
        error = None
        if results is not None:
            assert self._layout.whole is not None
            try:
                self._writer.finish(replace(self._layout.whole), results)
            except OSError as refused:
                error = refused
        raise_together(error)


def plan_save(planner: SavePlanner) -> SaveLayout:
    """Divide the writing among the ranks as each rank's planner, which is set up, proposes. Collective."""
    plans = _gather(planner.create_local_plan())
    parts: list[SavePlan] | None = None
    whole = None
    if plans is not None:
        parts, whole = planner.create_global_plan(plans)
        parts = _writer(Path()).prepare_global_plan(parts)  # names the files
    mine: list[SavePlan | None] = [None]
    dist.scatter_object_list(mine, parts, src=0)
    assert mine[0] is not None
    return SaveLayout(planner.finish_plan(mine[0]), whole)


def host_copies(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in memory of their own on the host, complete when this returns."""
    copies = []
    for tensor in tensors:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies.append(copy.copy_(tensor, non_blocking=True))
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copies


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a trainer asks of a state on disk."""

    backend: str
    mark: str
    """How names of this backend's states begin that no other backend's do."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of whole tensors, by name."""


def require(directory: Path, wanted: Wanted) -> None:
    """Raise RunError where the state on disk is another backend's, another model's, or has other tensors, which are
    named; OSError as the disk does. On every rank. Collective; rank 0 reads.
    """
    error: RunError | OSError | None = None
    if dist.get_rank() == 0:
        try:
            error = difference(directory, _read_metadata(directory), wanted)
        except (RunError, OSError) as refused:
            error = refused
    raise_together(error)


def difference(directory: Path, saved: Metadata, wanted: Wanted) -> RunError | None:
    """What stands against loading; None when nothing does."""
    there = {
        name: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in saved.state_dict_metadata.items()
    }
    here = wanted.shapes
    if not any(name.startswith(wanted.mark) for name in there):
        return RunError(
            f"{directory} holds no state of the {wanted.backend} backend",
            fix="set train.backend to the one that wrote it, or begin a new run",
        )
    misshapen = [
        f"{name} ({there[name]}, here {shape})" for name, shape in here.items() if there.get(name, shape) != shape
    ]
    parts = [
        _named("it lacks", [name for name in here if name not in there]),
        _named("the model does not have", [name for name in there if name not in here]),
        _named("of another shape are", misshapen),
    ]
    problems = "; ".join(part for part in parts if part)
    return another_model(directory, problems) if problems else None


def another_model(directory: Path, problems: str) -> RunError:
    """The refusal of a state that does not fit the model."""
    return RunError(
        f"{directory} is the state of another model: {problems}",
        fix="resume with the model that the run began with (model.path), or begin a new run",
    )


def first_cause(directory: Path, failure: CheckpointException) -> OSError | RunError:
    """The error behind DCP's report of all ranks: the disk's own where there is one."""
    causes = [cause for cause, _ in failure.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), damaged(directory, causes[0]))


def damaged(directory: Path, error: BaseException) -> RunError:
    """The refusal of files whose bytes make no sense."""
    return RunError(
        f"the trainer state in {directory} cannot be read: {type(error).__name__}: {error}",
        fix="the files are damaged or of another version of PyTorch: resume from another checkpoint",
    )


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
        raise damaged(directory, error) from error


def _named(what: str, names: list[str]) -> str:
    """`it lacks 12 tensors (first: a, b, c)`; empty when there are none."""
    if not names:
        return ""
    return f"{what} {len(names)} tensor{'s' * (len(names) > 1)} (first: {', '.join(names[:3])})"


def _gather(value: Any) -> list[Any] | None:
    """Everybody's value, by rank, on rank 0."""
    everyone: list[Any] | None = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, everyone, dst=0)
    return everyone
