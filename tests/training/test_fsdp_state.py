"""The FSDP2 trainer's state: saved while training goes on, loaded by fresh processes in any number.

On the same number of ranks the same bits are wanted. On others sums over ranks have another order: measured 1e-6 in
log-probabilities and 1.2e-7 in the weights after two more updates at a rate of 1e-2 (benchmarks/resharding.py). The
tolerances leave ten to twenty times that to other machines.
"""

import errno
import resource
from itertools import product
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed.checkpoint as dcp
from layouts import Case
from state_pairs import Distance, Pair, run_pairs, save, state_directory
from test_fsdp_backend import one_rank, train_section, update, weights
from transformers import AutoModelForCausalLM

from miles.config.schema import Backend, Dtype
from miles.errors import RunError
from miles.training.fsdp.backend import FsdpBackend

MODELS = ("qwen3", "qwen3-tied", "qwen3-moe")
LOG_PROBS_TOLERANCE = 1e-5
WEIGHTS_TOLERANCE = 2.5e-6


def case(model: str, ranks: int) -> Case:
    return Case(model, ranks=ranks, backend=Backend.FSDP)


PAIRS = [
    # On three ranks shards are uneven, and the third has none of the four experts.
    Pair(case(model, saved), case(model, loaded))
    for model, saved, loaded in [*product(("qwen3-tied", "qwen3-moe"), (1, 2), (1, 2)), ("qwen3-moe", 2, 3)]
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Pair, Distance]]:
    root = tmp_path_factory.mktemp("fsdp-state")
    return root, run_pairs(PAIRS, root)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.saved == pair.loaded], ids=str)
def test_the_same_ranks_resume_with_the_same_bits(pair: Pair, pairs: tuple[Path, dict[Pair, Distance]]) -> None:
    distance = pairs[1][pair]
    assert (distance.log_probs, distance.loss, distance.grad_norm, distance.weights) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.saved != pair.loaded], ids=str)
def test_other_ranks_resume_within_rounding(pair: Pair, pairs: tuple[Path, dict[Pair, Distance]]) -> None:
    distance = pairs[1][pair]
    assert distance.log_probs < LOG_PROBS_TOLERANCE
    assert distance.weights < WEIGHTS_TOLERANCE


def test_files_carry_their_rank(pairs: tuple[Path, dict[Pair, Distance]]) -> None:
    names = {path.name for path in state_directory(pairs[0], case("qwen3-moe", 2)).iterdir()}
    assert names == {"__0_0.distcp", "__1_0.distcp", ".metadata"}


def go_on(backend: FsdpBackend, rank: int, ranks: int, updates: int) -> None:
    for _ in range(updates):
        update(backend, reference.micro_batches(reference.sequences(), 2, rank, ranks))


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


# Single-process checks.


def test_a_save_before_the_first_update_changes_nothing(tmp_path: Path) -> None:
    """AdamW has no states yet: they are saved as it will make them."""
    model_dir = reference.build_model("qwen3", tmp_path / "model")
    with one_rank():
        never, saved, loaded = (FsdpBackend(model_dir, train_section(), seed=0) for _ in range(3))
        save(saved, tmp_path / "state")
        loaded.load_state(tmp_path / "state")
        for backend in (never, saved, loaded):
            go_on(backend, 0, 1, 3)
        assert same_bits(weights(never), weights(saved))
        assert same_bits(weights(never), weights(loaded))


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
