import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from miles.errors import RunError
from miles.runs.files import append_json, disk_errors, read_json_lines, remove_abandoned, write_atomic, write_new


def test_atomic_write_replaces_whole_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_atomic(file, "a long first version\n")
    write_atomic(file, "short\n")
    assert file.read_text() == "short\n"
    assert list(tmp_path.iterdir()) == [file]


def test_new_file_has_its_mode_and_never_replaces(tmp_path: Path) -> None:
    file = tmp_path / "token"
    write_new(file, "secret", mode=0o600)
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_new(file, "other")
    assert file.read_text() == "secret"


@pytest.mark.parametrize("torn", ['{"a": ', '{"a": 3}', "x" * 100_000])
def test_torn_last_line_is_unread_and_cut_by_the_next_append(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "lines.jsonl"
    append_json(file, {"a": 1})
    append_json(file, {"a": 2})
    with file.open("a") as stream:
        stream.write(torn)
    assert read_json_lines(file) == [{"a": 1}, {"a": 2}]
    append_json(file, {"a": 4})
    assert read_json_lines(file) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_torn_only_line_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a"')
    assert read_json_lines(file) == []
    append_json(file, {"a": 1})
    assert file.read_text() == '{"a":1}\n'


def test_damaged_line_before_the_last_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a": 1}\ngarbage\n{"a": 2}\n')
    with pytest.raises(RunError, match=r"lines\.jsonl, line 2"):
        read_json_lines(file)


def test_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none.jsonl") == []


def _append_many(file: Path, writer: int) -> None:
    for index in range(50):
        append_json(file, {"writer": writer, "index": index, "pad": "x" * 200})


def test_lines_of_two_processes_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(file, number)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(line["writer"], line["index"]) for line in lines} == {(w, i) for w in range(2) for i in range(50)}


def test_refused_write_is_a_run_error_with_the_path(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(RunError, match=r"cannot write .*Not a directory"):
        write_atomic(blocker / "state.json", "x")


@pytest.mark.parametrize(
    ("number", "reason", "fix"),
    [
        (errno.ENOSPC, "No space left on device", "free some space"),
        (errno.EDQUOT, "Disk quota exceeded", "your quota there is used up"),
        (errno.EIO, "Input/output error", "the disk or its server failed"),
        (errno.ESTALE, "Stale file handle", "its server took the directory away"),
        (errno.EROFS, "Read-only file system", "make it writable"),
        (errno.EACCES, "Permission denied", "make it writable"),
        (errno.ENOENT, "No such file or directory", "create the directory /runs/demo"),
    ],
)
def test_each_refusal_of_the_disk_says_what_to_do(number: int, reason: str, fix: str) -> None:
    with pytest.raises(RunError) as caught, disk_errors(Path("/runs/demo/state")):
        raise OSError(number, "as the system says it")
    assert caught.value.message == f"cannot write /runs/demo/state: {reason}"
    assert fix in str(caught.value.fix)


def test_real_read_error_is_a_run_error() -> None:
    """The start of a process's address space cannot be read: EIO."""
    file = Path("/proc/self/mem")
    if not file.exists():
        pytest.skip("this system has no /proc/self/mem")
    with pytest.raises(RunError, match="cannot read /proc/self/mem: Input/output error"), disk_errors(file, "read"):
        file.read_bytes()


def test_errors_of_the_program_pass_unchanged() -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught, disk_errors(Path("/runs/demo/state")):
        raise OSError(errno.EBADF, "Bad file descriptor")
    assert not isinstance(caught.value, RunError)


def test_a_leftover_of_the_same_process_number_does_not_stand_in_the_way(tmp_path: Path) -> None:
    leftover = tmp_path / f".a.json.{os.getpid()}.tmp"
    leftover.write_text("half a fi")
    write_atomic(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}"
    assert not leftover.exists()


def test_abandoned_temporary_files_are_removed_and_fresh_ones_left(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / "steps" / name for name in (".done.json.7.tmp", ".done.json.8.tmp", "done.json"))
    old.parent.mkdir()
    for path in (old, fresh, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    remove_abandoned(tmp_path)
    assert sorted(old.parent.iterdir()) == [fresh, other]
