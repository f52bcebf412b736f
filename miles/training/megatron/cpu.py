"""What it takes to run megatron-core on a CPU: each of its CUDA assumptions on our path, met without a GPU.

megatron-core names CUDA where any device would do. `cpu_megatron()` answers those names from the CPU while it
is entered and puts everything back when it is left, so that nothing else in the process notices. On a GPU it is
not used. Written against megatron-core 0.16.1; each replacement says which call it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


@contextmanager
def cpu_megatron() -> Iterator[None]:
    """Inside, megatron-core may be built, run and stepped with gloo and CPU tensors."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    replacements: list[tuple[Any, str, Any]] = [
        # Buffers of gradients, embeddings and pipeline messages are allocated on the "current device".
        (torch.cuda, "current_device", lambda: CPU),
        # A GPU must finish before a message is reused; splits are copied to the host on a side stream.
        (torch.cuda, "synchronize", _nothing),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "stream", lambda _: nullcontext()),
        # Forked around sequence-parallel regions; our models draw nothing there (no dropout).
        (random, "_CUDA_RNG_STATE_TRACKER", _NoRandomness()),
        (random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        # Recomputation saves and restores the GPU's generator beside the CPU's.
        (random, "_get_cuda_rng_state", lambda *_, **__: torch.empty(0, dtype=torch.uint8)),
        (random, "_set_cuda_rng_state", _nothing),
        # Without Transformer Engine, 0.16 reads this name in the router without having defined it.
        (moe_utils, "te_general_gemm", None),
        # The original leaves CPU tensors as they are; the split sizes of an all-to-all must be integers.
        (token_dispatcher, "maybe_move_tensor_to_cpu", _split_sizes),
    ]
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(_CudaNamesMeanCpu())
        yield


class _CudaNamesMeanCpu(TorchFunctionMode):
    """`device="cuda"` becomes the CPU, `Tensor.cuda()` the tensor itself, and `Tensor.type()` claims CUDA.

    The optimizer and gradient clipping sort tensors by `type()` and accept only 'torch.cuda.FloatTensor' and
    'torch.cuda.BFloat16Tensor'; counters and norms are created with a literal device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and torch.device(kwargs["device"] or CPU).type == "cuda":
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """A stream on a machine that has none: work is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


class _NoRandomness:
    """Stands for the tracker of CUDA generators."""

    def is_initialized(self) -> bool:
        return True

    def fork(self, name: str = "") -> nullcontext[None]:
        return nullcontext()

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        pass


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _split_sizes(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return value.tolist() if as_numpy and isinstance(value, torch.Tensor) else value
