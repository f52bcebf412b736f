"""Columns of an HDF5 file: tables with the narrowest integer types, runs, text, and the filters of long arrays. Pure.

Knows nothing of what the columns mean.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import h5py
import numpy as np

CHUNK_BYTES = 2**20
"""Filters work on pieces of this size; larger ones compress no better (benchmarks/journal.py)."""
PLAIN_BYTES = 256
"""Smaller arrays are stored as they are: a filter's own bookkeeping is as large."""
MAX_THREADS = 16
"""Compress at once; the node also has trainers and engines."""
FILTERS: Mapping[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
"""Higher levels take longer than they save; lzf is quicker and a fifth larger (benchmarks/journal.py)."""


def write_array(parent: h5py.Group, name: str, values: np.ndarray, filters: Mapping[str, Any] = FILTERS) -> None:
    """Store an array; one of some size in chunks along its first axis, filtered."""
    if values.nbytes < PLAIN_BYTES:
        parent.create_dataset(name, data=values)
        return
    rows = min(len(values), max(1, CHUNK_BYTES // max(1, values.nbytes // len(values))))
    chunks = (rows, *values.shape[1:])
    if filters.get("compression") != "gzip" or rows == len(values):
        parent.create_dataset(name, data=values, chunks=chunks, **filters)
        return
    dataset = parent.create_dataset(name, shape=values.shape, dtype=values.dtype, chunks=chunks, **filters)
    pack = partial(_packed, rows, filters["compression_opts"], filters.get("shuffle", False))
    starts = range(0, len(values), rows)
    # HDF5 would filter one chunk after the other; zlib in threads uses the cores that the node has.
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        packed = threads.map(pack, (values[start : start + rows] for start in starts))
        for start, chunk in zip(starts, packed, strict=True):
            dataset.id.write_direct_chunk((start, *[0] * (values.ndim - 1)), chunk)


def _packed(rows: int, level: int, shuffle: bool, values: np.ndarray) -> bytes:
    """A chunk as HDF5's shuffle and deflate filters make it; the last one is filled up to `rows`."""
    whole = np.zeros((rows, *values.shape[1:]), values.dtype)
    whole[: len(values)] = values
    data = whole.reshape(-1).view(np.uint8)
    if shuffle:
        data = np.ascontiguousarray(data.reshape(-1, values.itemsize).T)
    return zlib.compress(data.data, level)


def narrow(values: np.ndarray) -> np.ndarray:
    """The same integers in the smallest type that holds them all; unsigned when none is negative."""
    if not values.size:
        return values.astype(np.uint8)
    low, high = int(values.min()), int(values.max())
    if low < 0:
        return values.astype(np.promote_types(np.min_scalar_type(low), np.min_scalar_type(-1 - max(high, 0))))
    return values.astype(np.min_scalar_type(high))


def integers(values: Iterable[int], count: int = -1) -> np.ndarray:
    """int64 of Python integers; `count` of them, where that is known."""
    return np.fromiter(values, np.int64, count)


def floats(parts: Sequence[Sequence[float]], count: int) -> np.ndarray:
    """float32 where that holds every value exactly, else float64: what is read back is the same Python float."""
    values = np.fromiter(chain.from_iterable(parts), np.float64, count)
    with np.errstate(over="ignore"):
        short = values.astype(np.float32)
    exact = np.array_equal(short.astype(np.float64).view(np.uint64), values.view(np.uint64))
    return short if exact else values


def table(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """One structured array of equally long columns; integers become as narrow as they can."""
    fields = {name: narrow(column) if column.dtype.kind in "iu" else column for name, column in columns.items()}
    length = len(next(iter(fields.values())))
    rows = np.empty(length, dtype=[(name, column.dtype) for name, column in fields.items()])
    for name, column in fields.items():
        rows[name] = column
    return rows


def runs(values: np.ndarray) -> np.ndarray:
    """Runs of equal values, as a table of `value` and `count`."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if values.size else np.empty(0, int)
    return table({"value": values[starts], "count": np.diff(starts, append=len(values))})


def unrun(rows: np.ndarray) -> np.ndarray:
    """The values that `runs` was given, as int64."""
    return np.repeat(rows["value"].astype(np.int64), rows["count"])


def pack_text(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes of all texts in a row, and the bytes of each. Lone surrogates survive."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), integers(map(len, encoded), len(encoded))


def unpack_text(packed: np.ndarray, lengths: np.ndarray) -> list[str]:
    """The texts that `pack_text` was given."""
    data = packed.tobytes()
    return [data[start:end].decode("utf-8", "surrogatepass") for start, end in spans(lengths)]


def spans(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each part of a column, from the parts' lengths."""
    ends = np.cumsum(lengths.astype(np.int64))
    return list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))
