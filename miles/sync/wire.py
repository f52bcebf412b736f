"""The body of SGLang's `/update_weights_from_tensor`: a flattened bucket, pickled by reference to shared memory.

SGLang unpickles `{"flattened_tensor": uint8 tensor, "metadata": [object with name, shape, dtype, start_idx, end_idx,
numel]}`, where the offsets count bytes. The tensor itself does not travel: torch's reductions put a handle into the
pickle (a CUDA IPC handle, or the name of a shared-memory file on a CPU), so sender and receiver share a host.
`loads` is the embedded engine's reader: it resolves only the names that such a pickle contains, so a hostile body
cannot run code there.

Owns no HTTP and no bucketing; see `miles.sync.push`.
"""

from __future__ import annotations

import base64
import io
import math
import pickle
import signal
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

NamedTensors = list[tuple[str, torch.Tensor]]

ALLOWED_GLOBALS = {
    ("types", "SimpleNamespace"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "uint8"),
    ("torch", "float32"),
    ("torch", "float16"),
    ("torch", "bfloat16"),
    ("torch", "float8_e4m3fn"),
    ("torch", "int32"),
    ("torch", "int64"),
    ("torch.storage", "UntypedStorage"),
    ("torch.multiprocessing.reductions", "rebuild_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
}


class Bucket:
    """Tensors of one device laid end to end in one uint8 buffer. Keep it alive until every receiver has copied."""

    def __init__(self, named: NamedTensors) -> None:
        # Widest type first: each tensor's byte offset is then a multiple of its item size.
        ordered = sorted(named, key=lambda item: -item[1].element_size())
        flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in ordered]
        self.buffer = torch.cat(flat)
        self.metadata = []
        start = 0
        for (name, tensor), bytes_ in zip(ordered, flat, strict=True):
            end = start + bytes_.numel()
            self.metadata.append(
                SimpleNamespace(
                    name=name,
                    shape=tensor.shape,
                    dtype=tensor.dtype,
                    start_idx=start,
                    end_idx=end,
                    numel=bytes_.numel(),
                )
            )
            start = end

    def dumps(self) -> str:
        """Base64 of the pickle: one entry of `serialized_named_tensors`."""
        stream = io.BytesIO()
        # A file name can be opened by any process of this user; a descriptor only by a child.
        previous = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        # The first time, torch starts a process that must outlive the signals that Slurm sends to all of a job.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            ForkingPickler(stream).dump({"flattened_tensor": self.buffer, "metadata": self.metadata})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            torch.multiprocessing.set_sharing_strategy(previous)
        return base64.b64encode(stream.getvalue()).decode()


class _BucketUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise ValueError(f"a weight bucket must not contain {module}.{name}")
        return super().find_class(module, name)


def loads(body: str) -> NamedTensors:
    """The tensors of one bucket, as views of the sender's shared memory: copy before answering the request.

    Raises ValueError for anything that is not a well-formed bucket.
    """
    try:
        payload = _BucketUnpickler(io.BytesIO(base64.b64decode(body, validate=True))).load()
        buffer, metadata = payload["flattened_tensor"], payload["metadata"]
        return [(entry.name, _view(buffer, entry)) for entry in metadata]
    except ValueError:
        raise
    except (
        pickle.UnpicklingError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        ImportError,
    ) as error:
        raise ValueError(f"not a weight bucket: {error}") from error


def _view(buffer: torch.Tensor, entry: SimpleNamespace) -> torch.Tensor:
    size = math.prod(entry.shape) * entry.dtype.itemsize
    if not 0 <= entry.start_idx <= entry.end_idx <= buffer.numel() or entry.end_idx - entry.start_idx != size:
        raise ValueError(
            f"{entry.name}: bytes {entry.start_idx} to {entry.end_idx} of a bucket of {buffer.numel()} bytes "
            f"are not a tensor of shape {list(entry.shape)} and type {entry.dtype}"
        )
    return buffer[entry.start_idx : entry.end_idx].view(entry.dtype).view(entry.shape)
