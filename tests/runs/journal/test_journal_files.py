import random
from pathlib import Path

import pytest
from journal_records import batch

from miles.runs.claim import Fence
from miles.runs.journal.codec import batch_content, encode
from miles.runs.journal.files import JournalFile, list_files, newest_batch, read_file, step_directories, write_file
from miles.runs.manifest import DamagedError
from miles.runs.paths import RunPaths


@pytest.fixture
def file(tmp_path: Path) -> JournalFile:
    """A batch on the disk."""
    data = encode(batch_content(batch(1, [1])))
    return write_file(tmp_path / "step-000001", "batch", 1, data, Fence(RunPaths(tmp_path), None))


def test_what_was_written_is_read(file: JournalFile, tmp_path: Path) -> None:
    assert read_file(file) == bytes(encode(batch_content(batch(1, [1]))))
    assert list_files(tmp_path / "step-000001", "batch") == [file]
    assert newest_batch(tmp_path / "step-000001") == file


def test_every_flipped_bit_and_every_cut_is_damage(file: JournalFile) -> None:
    data = file.path.read_bytes()
    places = random.Random(0)
    flips = [(places.randrange(len(data)), 1 << places.randrange(8)) for _ in range(300)]
    damaged = [data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :] for i, bit in flips]
    damaged += [data[: places.randrange(len(data))] for _ in range(50)] + [b"", data[:-1], data + b"\0"]
    for content in damaged:
        file.path.write_bytes(content)
        with pytest.raises(DamagedError, match=file.path.name):
            read_file(file)


def test_file_that_is_gone_is_damage(file: JournalFile) -> None:
    file.path.unlink()
    with pytest.raises(DamagedError, match="cannot be read: No such file"):
        read_file(file)


def test_other_names_are_not_the_journals(file: JournalFile, tmp_path: Path) -> None:
    for name in ("step-1", "steps", "damaged-000001-1"):
        (tmp_path / name).mkdir()
    for name in ("batch-1.h5", "segment-000001-xyz.h5", "." + file.path.name + ".1.tmp", "notes.txt"):
        (file.path.parent / name).write_text("")
    assert list(step_directories(tmp_path)) == [1]
    assert list_files(file.path.parent, "batch") == [file]
    assert list_files(file.path.parent, "segment") == []


def test_step_with_more_than_six_digits_comes_in_order(tmp_path: Path) -> None:
    for step in (1_000_000, 999_999):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert list(step_directories(tmp_path)) == [999_999, 1_000_000]
