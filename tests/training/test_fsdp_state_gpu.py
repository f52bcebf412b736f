"""The FSDP2 trainer's state on the GPUs of one host: same bits after a restart, no later update in a save."""

import os
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from state_pairs import save
from test_fsdp_backend import one_rank, train_section, weights
from test_fsdp_state import MODELS, go_on, same_bits

from miles.config.schema import Dtype
from miles.training.fsdp.backend import FsdpBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (Dtype.FLOAT32, Dtype.BFLOAT16)


def rank_main(rank: int, ranks: int, root: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{root}/rendezvous", rank=rank, world_size=ranks)
    results = {
        (model, dtype): save_and_load(Path(root), model, dtype, rank, ranks) for model in MODELS for dtype in DTYPES
    }
    torch.save(results, f"{root}/rank{rank}.pt")
    dist.destroy_process_group()


def save_and_load(root: Path, model: str, dtype: Dtype, rank: int, ranks: int) -> dict[str, bool]:
    """Save after two updates while the third is queued on the stream; load that into a fresh trainer."""
    train = train_section(device="cuda", dtype=dtype)
    directory = root / f"{model}-{dtype}"
    backend = FsdpBackend(root / model, train, seed=0)
    go_on(backend, rank, ranks, 2)
    before = masters(backend)
    save(backend, directory, meanwhile=lambda: go_on(backend, rank, ranks, 1))
    fresh = FsdpBackend(root / model, train, seed=0)
    fresh.load_state(directory)
    loaded = masters(fresh)
    go_on(fresh, rank, ranks, 1)
    return {"loaded": same_bits(before, loaded), "continued": same_bits(masters(backend), masters(fresh))}


def masters(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    return {name: value.detach().full_tensor().cpu() for name, value in backend._model.named_parameters()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, bool]]]:
    root, ranks = tmp_path_factory.mktemp("fsdp-state-gpu"), torch.cuda.device_count()
    for model in MODELS:
        reference.build_model(model, root / model)
    mp.start_processes(rank_main, (ranks, str(root)), nprocs=ranks, start_method="spawn")
    return [torch.load(root / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_save_holds_the_state_of_its_moment(model: str, dtype: Dtype, results: Any) -> None:
    assert all(result[model, dtype]["loaded"] for result in results)


@pytest.mark.parametrize("model", ["qwen3", "qwen3-tied"])
def test_the_next_update_has_the_same_bits(model: str, results: Any) -> None:
    """Dense models in float32: attention's and the experts' gradients add in any order elsewhere."""
    assert all(result[model, Dtype.FLOAT32]["continued"] for result in results)


def test_a_gpu_takes_over_the_state_of_a_cpu(tmp_path: Path) -> None:
    model_dir = reference.build_model("qwen3-moe", tmp_path / "model")
    with one_rank():
        cpu = FsdpBackend(model_dir, train_section(), seed=0)
        go_on(cpu, 0, 1, 1)
        save(cpu, tmp_path / "state")
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    gpu = FsdpBackend(model_dir, train_section(device="cuda"), seed=0)
    gpu.load_state(tmp_path / "state")
    assert same_bits(weights(cpu), {name: value.cpu() for name, value in weights(gpu).items()})
    dist.destroy_process_group()
