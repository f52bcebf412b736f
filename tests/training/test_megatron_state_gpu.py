"""The megatron trainer's state on GPUs: megatron-core's modules in float32, Transformer Engine's in bfloat16.

Fresh processes resume in the saved layout and in others. Kernels may add in any order, so that going on differs in the
last bits even in the same layout; the loaded state itself has the same bits, which its log-probabilities show.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
from layouts import Case, build, enter_process_group, leave_process_group, weights
from state_pairs import Distance, Pair, run_pairs, save

from miles.config.schema import Dtype
from miles.training.backend import TrainerBackend

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]

_CPU_PAIRS = [
    (Case("qwen3"), Case("qwen3")),
    (Case("qwen3-moe"), Case("qwen3-moe")),
    (Case("qwen3-tied", ranks=2), Case("qwen3-tied", ranks=2, tensor=2)),
    (Case("qwen3-tied", ranks=2, tensor=2), Case("qwen3-tied", ranks=2, pipeline=2)),
    (Case("qwen3-moe", ranks=2, expert=2), Case("qwen3-moe")),
    (Case("qwen3-moe"), Case("qwen3-moe", ranks=2, expert=2)),
]
PAIRS = [
    Pair(*(replace(case, device="cuda", dtype=dtype) for case in pair))
    for pair in _CPU_PAIRS
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16)
    if max(case.ranks for case in pair) <= max(GPUS, 1)
]
TOLERANCE = {
    Dtype.FLOAT32: {"log_probs": 2e-5, "loss": 2e-5, "grad_norm": 2e-5, "weights": 2e-5},
    Dtype.BFLOAT16: {"log_probs": 0.5, "loss": 0.05, "grad_norm": 0.05, "weights": 0.05},
}


@pytest.fixture(scope="module")
def distances(tmp_path_factory: pytest.TempPathFactory) -> dict[Pair, Distance]:
    return run_pairs(PAIRS, tmp_path_factory.mktemp("gpu-state"))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_resumed_trainer_goes_on_as_the_saved_one(pair: Pair, distances: dict[Pair, Distance]) -> None:
    found = vars(distances[pair])
    print(pair, {name: f"{value:.1e}" for name, value in found.items()})
    bounds = TOLERANCE[pair.saved.dtype]
    assert {name: found[name] for name, bound in bounds.items() if not found[name] <= bound} == {}
    if pair.saved == pair.loaded:
        assert found["log_probs"] == 0.0


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_a_save_holds_the_state_of_its_moment(dtype: Dtype, tmp_path: Path) -> None:
    """The next update is queued on the stream between the copy and the write; the step count comes back too."""
    case = Case("qwen3", device="cuda", dtype=dtype)
    model_dir = reference.build_model("qwen3", tmp_path / "model")
    enter_process_group(case, 0, 0, f"file://{tmp_path}/rendezvous")
    backend, fresh = build(case, model_dir), build(case, model_dir)
    _update(backend)
    before = weights(backend)
    save(backend, tmp_path / "state", meanwhile=lambda: _update(backend))
    fresh.load_state(tmp_path / "state")
    assert reference.largest_difference(before, weights(fresh))[0] == 0.0
    save(fresh, tmp_path / "again")
    again = build(case, model_dir)
    again.load_state(tmp_path / "again")
    assert reference.largest_difference(before, weights(again))[0] == 0.0
    dist.barrier()
    leave_process_group()


def _update(backend: TrainerBackend) -> None:
    batches = reference.micro_batches(reference.sequences(), 2)
    backend.update(batches, reference.loss, lr=reference.LR, temperature=reference.TEMPERATURE)
