import json
import math
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import RunError
from miles.runs.manifest import (
    MANIFEST,
    CheckpointInfo,
    DamagedError,
    FileSum,
    Manifest,
    encode,
    file_damage,
    read_manifest,
    sum_files,
)
from tests.runs.checkpoint_files import info

SMALL = Manifest(info(40), {"rollout.h5": FileSum(7, "00" * 16)})


def _write(directory: Path, data: bytes) -> None:
    (directory / MANIFEST).write_bytes(data)


def test_every_flipped_bit_of_every_byte_is_detected(tmp_path: Path) -> None:
    data = encode(SMALL)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            _write(tmp_path, bytes(flipped))
            with pytest.raises(DamagedError, match=r"manifest\.json: not what was written"):
                read_manifest(tmp_path)


def test_every_truncation_and_anything_appended_is_detected(tmp_path: Path) -> None:
    data = encode(SMALL)
    for other in (*(data[:length] for length in range(len(data))), data + b"\n", data + data):
        _write(tmp_path, other)
        with pytest.raises(DamagedError):
            read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "null", '{"xxh3": null}', '{"xxh3": NaN}', '{"a": "\\ud800", "xxh3": "1"}'])
def test_other_json_is_damage(tmp_path: Path, text: str) -> None:
    _write(tmp_path, text.encode())
    with pytest.raises(DamagedError):
        read_manifest(tmp_path)


def test_missing_manifest_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"manifest\.json: missing"):
        read_manifest(tmp_path)


def test_manifest_of_a_newer_version_is_no_damage_and_says_what_to_do(tmp_path: Path) -> None:
    body = {"schema": 2, "shards": ["whatever a newer one holds"]}
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    sealed = body | {"xxh3": xxhash.xxh3_128_hexdigest(text.encode())}
    _write(tmp_path, (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode())
    with pytest.raises(RunError, match="has format 2; this Miles reads formats up to 1") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, DamagedError)
    assert "version of Miles that wrote it" in str(caught.value.fix)


text = st.text(st.characters(codec="utf-8"), max_size=20)
number = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        Manifest,
        info=st.builds(
            CheckpointInfo,
            **{name: text for name in ("stage", "inputs", "backend")},
            **{name: st.integers(0, 10**9) for name in ("step", "attempt", "world_size")},
            **{name: number for name in ("created", "save_seconds", "stall_seconds")},
            metrics=st.dictionaries(text, number, max_size=3),
            trackers=st.dictionaries(text, text, max_size=3),
        ),
        files=st.dictionaries(text, st.builds(FileSum, size=st.integers(0, 2**60), xxh3=text), max_size=3),
    )
)
def test_manifest_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    _write(directory, encode(manifest))
    assert read_manifest(directory) == manifest


def test_metrics_that_are_not_finite_come_back_as_nan(tmp_path: Path) -> None:
    _write(tmp_path, encode(Manifest(info(1, {"loss": math.inf, "reward": math.nan, "lr": 0.5}), {})))
    metrics = read_manifest(tmp_path).info.metrics
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["reward"])
    assert metrics["lr"] == 0.5


def test_sums_are_those_of_xxhash_over_files_larger_than_a_block(tmp_path: Path) -> None:
    data = bytes(range(256)) * (5 * 2**20 // 256)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/large").write_bytes(data)
    assert sum_files(tmp_path, ["sub/large"]) == {"sub/large": FileSum(len(data), xxhash.xxh3_128_hexdigest(data))}
    with pytest.raises(RunError, match=r"none: No such file"):
        sum_files(tmp_path, ["none"])


def test_file_that_the_disk_cannot_give_back_is_damage() -> None:
    """The start of a process's address space is a regular file whose reading really fails with EIO."""
    file = Path("/proc/self/mem")
    if not file.exists():
        pytest.skip("this system has no /proc/self/mem")
    assert file_damage(file, FileSum(0, "00" * 16)) == "Input/output error"


def test_directory_in_place_of_a_file_is_damage(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    assert file_damage(tmp_path / "file", FileSum(0, "")) == "not a file"
    assert file_damage(tmp_path / "file/below", FileSum(0, "")) == "missing"
