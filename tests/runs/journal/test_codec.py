import json
import random
from pathlib import Path

import h5py
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_records import PROMPTS, batch, batch_facts, batches, finished

from miles.data.sample import Prompt
from miles.errors import DataError, RunError
from miles.runs.journal import Batch, read_batch, write_batch
from miles.runs.journal.codec import VERSION, batch_content, decode, encode
from miles.runs.manifest import DamagedError

slow_machine = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@slow_machine
@given(batches())
def test_batch_comes_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, wanted: Batch) -> None:
    path = tmp_path_factory.mktemp("rollout") / "rollout.h5"
    write_batch(path, wanted)
    assert batch_facts(read_batch(path, PROMPTS)) == batch_facts(wanted)


@slow_machine
@given(batches())
def test_same_batch_is_the_same_bytes(wanted: Batch) -> None:
    assert bytes(encode(batch_content(wanted))) == bytes(encode(batch_content(wanted)))


def test_batch_larger_than_a_chunk_comes_back_to_the_bit(tmp_path: Path) -> None:
    wanted = Batch(1, [finished(i, tokens=200_000 + i, size=1) for i in (1, 2)], [], [], cursor=3)
    write_batch(tmp_path / "rollout.h5", wanted)
    assert batch_facts(read_batch(tmp_path / "rollout.h5", PROMPTS)) == batch_facts(wanted)


@pytest.mark.parametrize(
    ("log_probs", "dtype"), [([-0.1, -2.0], "float64"), ([-0.5, -0.0, -(2.0**-140)], "float32"), ([-1e39], "float64")]
)
def test_log_probs_are_float32_where_that_is_exact(log_probs: list[float], dtype: str, tmp_path: Path) -> None:
    group = finished(1, size=1, tokens=len(log_probs), routes=False)
    group.samples[0].log_probs = log_probs
    write_batch(tmp_path / "rollout.h5", Batch(1, [group], [], [], cursor=2))
    with h5py.File(tmp_path / "rollout.h5") as file:
        assert file["log_probs"].dtype == dtype
    again = read_batch(tmp_path / "rollout.h5", PROMPTS).groups[0].samples[0].log_probs
    assert [value.hex() for value in again] == [value.hex() for value in log_probs]


def test_token_ids_are_as_narrow_as_they_can(tmp_path: Path) -> None:
    write_batch(tmp_path / "rollout.h5", batch(1, [1]))
    with h5py.File(tmp_path / "rollout.h5") as file:
        assert file["tokens"].dtype == "uint16"
        assert file["routed_experts"].dtype == "uint8"
        assert len(file["loss_mask"]) == 1


def test_without_prompts_the_stored_ids_and_tokens_are_used(tmp_path: Path) -> None:
    write_batch(tmp_path / "rollout.h5", batch(1, [1]))
    assert read_batch(tmp_path / "rollout.h5", None).groups[0].prompt == Prompt("a", [1, 2, 3], text="")


def test_prompt_that_is_not_in_the_data_is_named(tmp_path: Path) -> None:
    write_batch(tmp_path / "rollout.h5", batch(1, [1]))
    with pytest.raises(DataError, match=r"prompt 'a', which is not in the data.*\n.*--fresh"):
        read_batch(tmp_path / "rollout.h5", {"c": PROMPTS["a"]})


def test_prompt_with_other_tokens_is_named(tmp_path: Path) -> None:
    write_batch(tmp_path / "rollout.h5", batch(1, [1]))
    with pytest.raises(DataError, match="prompt 'a' had other tokens"):
        read_batch(tmp_path / "rollout.h5", PROMPTS | {"a": Prompt("a", [1, 2, 4], "")})


def test_newer_version_is_not_damage(tmp_path: Path) -> None:
    path = tmp_path / "rollout.h5"
    write_batch(path, batch(1, [1]))
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = VERSION + 1
    with pytest.raises(RunError, match=f"version {VERSION + 1} .* reads up to {VERSION}") as caught:
        read_batch(path, PROMPTS)
    assert not isinstance(caught.value, DamagedError)


def test_other_hdf5_file_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["format"] = "something"
    with pytest.raises(DamagedError, match="no file of the rollout journal"):
        read_batch(tmp_path / "other.h5", PROMPTS)


def test_group_that_is_trained_on_and_carried_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="once"):
        write_batch(tmp_path / "rollout.h5", Batch(1, [finished(1)], [finished(1)], [], cursor=2))


@slow_machine
@given(st.integers(0, 10**9))
def test_bytes_cut_off_are_damage_even_without_a_checksum(seed: int) -> None:
    data = bytes(encode(batch_content(batch(1, [1]))))
    cut = random.Random(seed).randrange(len(data))
    with pytest.raises(DamagedError):
        decode(data[:cut], "file")


def test_names_of_reward_parts_are_readable(tmp_path: Path) -> None:
    write_batch(tmp_path / "rollout.h5", batch(1, [1]))
    with h5py.File(tmp_path / "rollout.h5") as file:
        assert json.loads(file.attrs["reward_parts"]) == ["math", "length"]
