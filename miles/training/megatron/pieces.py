"""Parts of whole tensors that a rank holds in flat memory; torch.distributed.checkpoint (DCP) writes and reads them.

Owns geometry and planning; what the tensors are is said by `miles.training.megatron.state`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a whole tensor."""

    name: str
    whole: Shape
    offset: Shape
    """Where in the whole tensor the box begins."""
    tensor: torch.Tensor
    """Its values, of the box's shape."""

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, torch.Size(self.offset))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), self.tensor.shape)


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Offsets and shapes of the boxes that elements [start, stop) of a row-major tensor fill, in their order.

    A flat range of a matrix is at most three: the end of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _within_row(shape, last, start, stop)
        return
    yield from _within_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within_row(shape, last, last * row, stop)


def _within_row(shape: Shape, index: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    before = index * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - before, stop - before):
        yield (index, *offset), (1, *size)


class WritingPlanner(DefaultSavePlanner):
    """Writes pieces. No two ranks have the same ones."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = {piece.index: piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(piece) for piece in self._pieces.values()])

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._pieces[index].tensor


class ReadingPlanner(DefaultLoadPlanner):
    """Reads into pieces, in place, from whatever boxes the tensors were written in."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = {piece.index: piece for piece in pieces}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for piece in self._pieces.values():
            saved = self.metadata.state_dict_metadata[piece.name]
            assert isinstance(saved, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(piece.name, saved, [piece.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._pieces[index].tensor


def _write_item(piece: Piece) -> WriteItem:
    return WriteItem(
        index=piece.index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=piece.chunk,
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.whole),
        ),
    )
