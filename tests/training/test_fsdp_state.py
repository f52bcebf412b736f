"""The FSDP2 trainer's state: saved while training goes on, loaded by fresh processes in any number.

An uninterrupted run of `UPDATES` updates on 1 and on 2 ranks is saved before the first and after the second update;
the processes of a second start load each save on 1, 2 and 3 ranks (3: a rank without experts, uneven shards) and go on.

On the same number of ranks the same bits are wanted. On others sums over ranks have another order: measured 1e-6 in
log-probabilities and 2.4e-7 in the weights after two or four more updates at a rate of 1e-2. The tolerances leave ten
times that to other machines.
"""

import errno
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from test_fsdp_backend import one_rank, outputs_of, train_section, update, weights
from transformers import AutoModelForCausalLM

from miles.config.schema import Dtype
from miles.errors import RunError
from miles.training.fsdp.backend import FsdpBackend

MODELS = ("qwen3", "qwen3-tied", "qwen3-moe")
SAVED_ON = (1, 2)
LOADED_ON = (1, 2, 3)
SAVED_AFTER = (0, 2)
UPDATES = 4
LOG_PROBS_TOLERANCE = 1e-5
WEIGHTS_TOLERANCE = 2.5e-6


@dataclass(frozen=True)
class Trained:
    """What one rank saw of a run, or of its continuation."""

    log_probs: dict[int, torch.Tensor]
    """At the state of the save, by index of the sequence."""
    weights: dict[str, torch.Tensor]
    """At the end."""


def state_directory(root: Path, model: str, ranks: int, updates: int) -> Path:
    return root / f"{model}-{ranks}-ranks-{updates}-updates"


def save(backend: FsdpBackend, directory: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    """A whole save as the checkpointer does it, with something happening between the copy and the write."""
    directory.mkdir(exist_ok=True)
    dist.barrier()
    pending = backend.begin_save(directory)
    meanwhile()
    writer = threading.Thread(target=pending.write)
    writer.start()
    writer.join()
    pending.finalize()


def log_probs(backend: FsdpBackend, rank: int, ranks: int) -> dict[int, torch.Tensor]:
    batches = reference.micro_batches(reference.sequences(), 2, rank, ranks)
    return {
        index: part
        for batch, out in outputs_of(backend, batches)
        for index, part in zip(batch.indices, out.log_probs.cpu().split(batch.lengths), strict=True)
    }


def go_on(backend: FsdpBackend, rank: int, ranks: int, updates: int) -> None:
    for _ in range(updates):
        update(backend, reference.micro_batches(reference.sequences(), 2, rank, ranks))


def uninterrupted(root: Path, model: str, rank: int, ranks: int, device: str, saves: bool) -> Trained:
    """All updates in one go, with or without saves on the way. Every save is written after the next update."""
    backend = FsdpBackend(root / model, train_section(device=device), seed=0)
    seen: dict[int, torch.Tensor] = {}
    for done in range(UPDATES):
        if saves and done in SAVED_AFTER:
            seen = log_probs(backend, rank, ranks)
            directory = state_directory(root, model, ranks, done)
            save(backend, directory, meanwhile=lambda: go_on(backend, rank, ranks, 1))
        else:
            go_on(backend, rank, ranks, 1)
    return Trained(seen, weights(backend))


def resumed(root: Path, model: str, rank: int, ranks: int, device: str, saved_on: int, updates: int) -> Trained:
    backend = FsdpBackend(root / model, train_section(device=device), seed=0)
    backend.load_state(state_directory(root, model, saved_on, updates))
    seen = log_probs(backend, rank, ranks)
    go_on(backend, rank, ranks, UPDATES - updates)
    return Trained(seen, weights(backend))


def first_start(rank: int, root: Path, ranks: int, device: str) -> dict[Any, Trained]:
    return {
        (model, ranks, saves): uninterrupted(root, model, rank, ranks, device, saves)
        for model in MODELS
        for saves in (False, True)
    }


def second_start(rank: int, root: Path, ranks: int, device: str) -> dict[Any, Trained]:
    return {
        (model, ranks, saved_on, updates): resumed(root, model, rank, ranks, device, saved_on, updates)
        for model in MODELS
        for saved_on in SAVED_ON
        for updates in SAVED_AFTER
    }


def process_main(process: int, start: Callable[..., dict], sizes: tuple[int, ...], root: str, device: str) -> None:
    """Take part in the groups that are large enough to have this process in them."""
    torch.set_num_threads(1)
    results: dict[Any, Trained] = {}
    for ranks in sizes:
        if process >= ranks:
            continue
        rendezvous = f"file://{root}/rendezvous-{start.__name__}-{ranks}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=ranks)
        results |= start(process, Path(root), ranks, device)
        dist.destroy_process_group()
    torch.save(results, f"{root}/{start.__name__}-{process}.pt")


def run(start: Callable[..., dict], sizes: tuple[int, ...], root: Path, device: str) -> dict[Any, list[Trained]]:
    """Results of all ranks by case."""
    mp.start_processes(process_main, (start, sizes, str(root), device), nprocs=max(sizes), start_method="spawn")
    parts = [torch.load(root / f"{start.__name__}-{process}.pt", weights_only=False) for process in range(max(sizes))]
    return {case: [part[case] for part in parts if case in part] for case in parts[0]}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, list[Trained]], dict[Any, list[Trained]]]:
    root = tmp_path_factory.mktemp("fsdp-state")
    for model in MODELS:
        reference.build_model(model, root / model)
    return root, run(first_start, SAVED_ON, root, "cpu"), run(second_start, LOADED_ON, root, "cpu")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", SAVED_ON)
def test_saving_changes_nothing(model: str, ranks: int, starts: Any) -> None:
    _, first, _ = starts
    for without, with_saves in zip(first[model, ranks, False], first[model, ranks, True], strict=True):
        assert same_bits(without.weights, with_saves.weights)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", SAVED_ON)
@pytest.mark.parametrize("updates", SAVED_AFTER)
def test_the_same_ranks_resume_with_the_same_bits(model: str, ranks: int, updates: int, starts: Any) -> None:
    _, first, second = starts
    for before, after in zip(first[model, ranks, True], second[model, ranks, ranks, updates], strict=True):
        assert same_bits(before.weights, after.weights)
        if updates == SAVED_AFTER[-1]:
            assert same_bits(before.log_probs, after.log_probs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("saved_on", SAVED_ON)
@pytest.mark.parametrize("ranks", LOADED_ON)
@pytest.mark.parametrize("updates", SAVED_AFTER)
def test_other_ranks_resume_within_rounding(model: str, saved_on: int, ranks: int, updates: int, starts: Any) -> None:
    _, first, second = starts
    wanted = first[model, saved_on, True]
    found = second[model, ranks, saved_on, updates]
    for after in found:
        difference, where = reference.largest_difference(after.weights, wanted[0].weights)
        assert difference < WEIGHTS_TOLERANCE, where
    if updates == SAVED_AFTER[-1]:
        difference, _ = reference.largest_difference(
            {str(i): value for part in found for i, value in part.log_probs.items()},
            {str(i): value for part in wanted for i, value in part.log_probs.items()},
        )
        assert difference < LOG_PROBS_TOLERANCE


def test_files_carry_their_rank(starts: Any) -> None:
    root, _, _ = starts
    names = {path.name for path in state_directory(root, "qwen3-moe", 2, 2).iterdir()}
    assert names == {"__0_0.distcp", "__1_0.distcp", ".metadata"}


def same_bits(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


# Single-process checks.


def test_what_is_written_is_the_state_of_the_copy(tmp_path: Path) -> None:
    """The trainer updates in place between the copy and the write; the file must hold what was before."""
    model_dir = reference.build_model("qwen3", tmp_path / "model")
    with one_rank():
        backend = FsdpBackend(model_dir, train_section(), seed=0)
        go_on(backend, 0, 1, 1)
        before = weights(backend)
        save(backend, tmp_path / "state", meanwhile=lambda: go_on(backend, 0, 1, 1))
        assert reference.largest_difference(before, weights(backend))[0] > 1e-3
        backend.load_state(tmp_path / "state")
        assert same_bits(before, weights(backend))


def test_masters_of_a_bfloat16_trainer_are_saved_in_float32(tmp_path: Path) -> None:
    model_dir = reference.build_model("qwen3-moe", tmp_path / "model")
    with one_rank():
        backend = FsdpBackend(model_dir, train_section(dtype=Dtype.BFLOAT16), seed=0)
        go_on(backend, 0, 1, 1)
        masters = {name: value.detach().full_tensor() for name, value in backend._model.named_parameters()}
        save(backend, tmp_path / "state")
        saved = dcp.FileSystemReader(tmp_path / "state").read_metadata().state_dict_metadata
        fresh = FsdpBackend(model_dir, train_section(dtype=Dtype.BFLOAT16), seed=0)
        fresh.load_state(tmp_path / "state")
        loaded = {name: value.detach().full_tensor() for name, value in fresh._model.named_parameters()}
    assert {entry.properties.dtype for entry in saved.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())
    assert same_bits(masters, loaded)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ("qwen3-tied", "qwen3", r"another model: it lacks 4 tensors \(first: weights/lm_head.weight, exp_avg/lm_head"),
        ("qwen3", "qwen3-tied", r"the model does not have 4 tensors \(first: weights/lm_head.weight, "),
        ("qwen3", "qwen3-moe", r"it lacks 24 tensors .*mlp.gate.weight.*; the model does not have 24 tensors"),
    ],
)
def test_the_state_of_another_model_is_refused(saved: str, loaded: str, message: str, tmp_path: Path) -> None:
    with one_rank():
        save(FsdpBackend(reference.build_model(saved, tmp_path / "a"), train_section(), seed=0), tmp_path / "state")
        backend = FsdpBackend(reference.build_model(loaded, tmp_path / "b"), train_section(), seed=0)
        before = weights(backend)
        with pytest.raises(RunError, match=message):
            backend.load_state(tmp_path / "state")
        assert same_bits(before, weights(backend))


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    model_dir = reference.build_model("qwen3", tmp_path / "model")
    wide = reference.MODELS["qwen3"]()
    wide.vocab_size = 140
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    with one_rank():
        save(FsdpBackend(model_dir, train_section(), seed=0), tmp_path / "state")
        backend = FsdpBackend(tmp_path / "wide", train_section(), seed=0)
        with pytest.raises(RunError, match=r"of another shape are 6 tensors .*\(131, 32\), here \(140, 32\)"):
            backend.load_state(tmp_path / "state")


def test_states_of_nothing_and_of_others_are_refused(tmp_path: Path) -> None:
    with one_rank():
        backend = FsdpBackend(reference.build_model("qwen3", tmp_path / "model"), train_section(), seed=0)
        (tmp_path / "empty").mkdir()
        with pytest.raises(RunError, match="holds no trainer state"):
            backend.load_state(tmp_path / "empty")
        dcp.save({"decoder.weight": torch.zeros(3)}, checkpoint_id=tmp_path / "other")
        with pytest.raises(RunError, match=r"holds no state of the fsdp backend(.|\n)*set train.backend"):
            backend.load_state(tmp_path / "other")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("length", [0, 700, -100])
def test_cut_files_are_refused(name: str, length: int, tmp_path: Path) -> None:
    with one_rank():
        backend = FsdpBackend(reference.build_model("qwen3", tmp_path / "model"), train_section(), seed=0)
        save(backend, tmp_path / "state")
        content = (tmp_path / "state" / name).read_bytes()
        (tmp_path / "state" / name).write_bytes(content[:length])
        with pytest.raises(RunError, match="cannot be read"):
            backend.load_state(tmp_path / "state")


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """Of the shard, in the background thread, and of .metadata in finalize."""
    with one_rank():
        backend = FsdpBackend(reference.build_model("qwen3", tmp_path / "model"), train_section(), seed=0)
        for name in ("__0_0.distcp", ".metadata.tmp"):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).symlink_to("/dev/full")
        with pytest.raises(OSError) as caught:
            backend.begin_save(tmp_path / "__0_0.distcp").write()
        assert caught.value.errno == errno.ENOSPC
        pending = backend.begin_save(tmp_path / ".metadata.tmp")
        pending.write()
        with pytest.raises(OSError) as caught:
            pending.finalize()
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("bound", [1, 5_000, 100_000])
def test_a_refusal_in_the_middle_of_a_file_is_an_os_error(bound: int, tmp_path: Path) -> None:
    """Python ignores SIGXFSZ, so that a limit of the file's size is an EFBIG at any byte."""
    (tmp_path / "state").mkdir()
    with one_rank():
        backend = FsdpBackend(reference.build_model("qwen3", tmp_path / "model"), train_section(), seed=0)
        pending = backend.begin_save(tmp_path / "state")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bound, limits[1]))
        try:
            with pytest.raises(OSError) as caught:
                pending.write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG


def test_a_directory_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    with one_rank():
        backend = FsdpBackend(reference.build_model("qwen3", tmp_path / "model"), train_section(), seed=0)
        (tmp_path / "state").mkdir()
        pending = backend.begin_save(tmp_path / "state")
        (tmp_path / "state").rmdir()
        with pytest.raises(FileNotFoundError):
            pending.write()
