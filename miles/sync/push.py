"""Trainer weights into every engine, bucket by bucket, and the proof that they arrived.

All ranks take part in the export; rank 0 speaks HTTP. On a CPU rank 0's shared memory serves all engines. On GPUs an
engine reads from the trainer rank that stands on the same device, so each rank contributes a CUDA IPC handle and
engine i receives those of its own ranks, in world order.

Owns the transfer only; the weights belong to the trainer, their names to `miles.models`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from miles.errors import EngineError, EngineLost, UnknownRouteError
from miles.sync.checksum import checksum
from miles.sync.wire import Bucket, NamedTensors

Post = Callable[[str, list[dict], list[int]], list[dict | EngineLost]]
"""`post(path, bodies, engines)`: send bodies[i] to engines[i], all at once; the answers in the same order. An engine
that is gone answers with the EngineLost that says so."""


@dataclass(frozen=True, slots=True)
class SyncStats:
    """One transfer: tensors and bytes sent to each engine, wall seconds."""

    tensors: int
    bytes: int
    seconds: float
    reached: tuple[int, ...]
    """Engines that hold the weights now; those that were lost on the way are missing. Empty on ranks other than 0."""


class WeightSync:
    """Pushes weights to `engines` servers through `post` (rank 0 only; None on the others)."""

    def __init__(self, post: Post | None, *, engines: int, dtype: torch.dtype, bucket_bytes: int, verify: bool) -> None:
        self._post = post
        self._engines = engines
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._reached: list[int] = []

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int, engines: Sequence[int]) -> SyncStats:
        """Send all weights, cast to the engines' type, as `version` to some of the engines. Collective.

        These engines must be idle (SGLang's caches are flushed with the last bucket). One that dies meanwhile is left
        out. Raises EngineError when an engine refuses a bucket, or when it then holds other bits than were sent.
        """
        start = time.perf_counter()
        self._reached = list(engines)
        checksums: dict[str, str] = {}
        tensors = total = 0
        bracketed = self._begin()
        for named, last in _with_last(_buckets(self._cast(weights), self._bucket_bytes)):
            bucket = Bucket(named)
            tensors += len(named)
            total += bucket.buffer.numel()
            if self._verify and self._post is not None:
                checksums.update({name: checksum(tensor) for name, tensor in named})
            self._send_bucket(bucket, version, flush_cache=last)
        if bracketed:
            self._send("/end_weight_update", lambda _: {})
        self._check(checksums)
        seconds = time.perf_counter() - start
        return SyncStats(tensors=tensors, bytes=total, seconds=seconds, reached=tuple(self._reached))

    def _begin(self) -> bool:
        """Announce the update; False where the engines, SGLang before 0.5.23, need no announcement."""
        try:
            self._send("/begin_weight_update", lambda _: {})
        except UnknownRouteError:
            return False
        return True

    def _cast(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            yield name, tensor.detach().to(self._dtype)

    def _send_bucket(self, bucket: Bucket, version: int, *, flush_cache: bool) -> None:
        handles = self._handles(bucket)

        def body(engine: int) -> dict:
            return {
                "serialized_named_tensors": handles[engine],
                "load_format": "flattened_bucket",
                "flush_cache": flush_cache,
                "weight_version": str(version),
            }

        for engine, answer in self._send("/update_weights_from_tensor", body):
            if not answer.get("success"):
                raise EngineError(f"engine {engine} refused weights of version {version}: {answer.get('message')}")

    def _handles(self, bucket: Bucket) -> dict[int, list[str]]:
        """On rank 0, what each engine that is there receives: a handle of each of its trainer ranks; on a CPU, one."""
        if not bucket.buffer.is_cuda:
            # One each: torch counts the receivers of a handle, and removes the file after as many.
            return {engine: [bucket.dumps()] for engine in self._reached} if self._post is not None else {}
        torch.cuda.synchronize()
        gathered: list[str] | None = [""] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(bucket.dumps(), gathered, dst=0)
        if gathered is None:
            return {}
        per_engine = len(gathered) // self._engines
        return {engine: gathered[engine * per_engine : (engine + 1) * per_engine] for engine in self._reached}

    def _send(self, path: str, body: Callable[[int], dict]) -> list[tuple[int, dict]]:
        """POST body(engine) to every engine that is still there; the answers of those that remain."""
        if self._post is None or not self._reached:
            return []
        answers = self._post(path, [body(engine) for engine in self._reached], self._reached)
        given = [
            (e, answer) for e, answer in zip(self._reached, answers, strict=True) if not isinstance(answer, EngineLost)
        ]
        self._reached = [engine for engine, _ in given]
        return given

    def _check(self, sent: dict[str, str]) -> None:
        """Compare the engines' own checksums with those of what was sent, name by name."""
        if not self._verify:
            return
        for engine, answer in self._send("/weights_checker", lambda _: {"action": "checksum"}):
            held = answer["ranks"][0]["checksums"]
            wrong = sorted(name for name in sent.keys() | held.keys() if sent.get(name) != held.get(name))
            if wrong:
                raise EngineError(
                    f"engine {engine} holds other weights than the trainer sent: {len(wrong)} of {len(held)} tensors "
                    f"differ, first {wrong[0]}"
                )


def _buckets(weights: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[NamedTensors]:
    """Consecutive tensors of at most `limit` bytes together; a larger tensor makes a bucket of its own."""
    bucket: NamedTensors = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _with_last(items: Iterable[NamedTensors]) -> Iterator[tuple[NamedTensors, bool]]:
    """Each item with whether it is the last."""
    iterator = iter(items)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True
