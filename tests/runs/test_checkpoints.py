import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import RunError
from miles.runs.checkpoints import CheckpointStore, steps_to_keep
from miles.runs.claim import Claim, Fence, Overtaken
from miles.runs.manifest import MANIFEST, DamagedError, FileSum
from miles.runs.paths import RunPaths
from tests.runs.checkpoint_files import FILES, build, info, killed_at_every_change, save, store

EVERY_FILE = [*FILES, MANIFEST]


def _contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints/grpo").iterdir())


def test_committed_checkpoint_is_whole_and_described(tmp_path: Path) -> None:
    directory = save(tmp_path, 40)
    assert directory == tmp_path / "checkpoints/grpo/step-000040" == store(tmp_path).path(40)
    assert _contents(directory) == FILES
    manifest = store(tmp_path).read(40)
    assert manifest.info == info(40)
    assert {name: file.size for name, file in manifest.files.items()} == {name: len(d) for name, d in FILES.items()}
    assert store(tmp_path).damage(40) == []
    assert _names(tmp_path) == ["step-000040"]


def test_steps_are_numbers_and_nothing_else_counts(tmp_path: Path) -> None:
    assert store(tmp_path).steps() == []
    for step in (9, 10, 1_000_000):
        save(tmp_path, step)
    build(store(tmp_path), 11)
    (tmp_path / "checkpoints/grpo/step-000040.mine").mkdir()
    assert store(tmp_path).steps() == [9, 10, 1_000_000]


def test_everything_is_flushed_before_the_rename_and_the_rename_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    flush, rename = os.fsync, Path.rename

    def flush_and_tell(descriptor: int) -> None:
        flush(descriptor)
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def rename_and_tell(source: Path, target: Path) -> Path:
        done.append("rename")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", flush_and_tell)
    monkeypatch.setattr(Path, "rename", rename_and_tell)
    final = save(tmp_path, 40)
    draft = Path(done[0]).parents[1]
    before, after = set(done[: done.index("rename")]), set(done[done.index("rename") :])
    assert before >= {str(draft / name) for name in (*FILES, MANIFEST, "trainer", "rng", ".")}
    assert after >= {str(path) for path in (final.parent, final.parent.parent, tmp_path)}


# Damage


@pytest.mark.parametrize("name", EVERY_FILE)
def test_every_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 40) / name
    data = file.read_bytes()
    for length in sorted({0, 1, len(data) // 2, len(data) - 1} & set(range(len(data)))):
        file.write_bytes(data[:length])
        [line] = store(tmp_path).damage(40)
        assert line.startswith(f"{name}: ")
        assert name == MANIFEST or line == f"{name}: truncated, {length} of {len(data)} bytes"
    file.write_bytes(data + b"x")
    [line] = store(tmp_path).damage(40)
    assert name == MANIFEST or line == f"{name}: {len(data) + 1} bytes instead of {len(data)}"
    file.unlink()
    assert store(tmp_path).damage(40) == [f"{name}: missing"]


@pytest.mark.parametrize("name", [name for name in EVERY_FILE if name != "empty"])
def test_every_flipped_bit_is_named(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 40) / name
    data = file.read_bytes()
    for position in sorted({0, 1, len(data) // 2, len(data) - 2, len(data) - 1}):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        file.write_bytes(bytes(flipped))
        [line] = store(tmp_path).damage(40)
        assert line.startswith(f"{name}: checksum " if name != MANIFEST else f"{name}: not what was written")
    file.write_bytes(data)
    assert store(tmp_path).damage(40) == []


def test_shares_cover_every_file_once_and_each_sees_the_manifest(tmp_path: Path) -> None:
    directory = save(tmp_path, 40)
    for name in FILES:
        (directory / name).unlink()
    shares = [store(tmp_path).damage(40, share=(rank, 4)) for rank in range(4)]
    assert sorted(line for lines in shares for line in lines) == sorted(f"{name}: missing" for name in FILES)
    (directory / MANIFEST).unlink()
    assert {tuple(store(tmp_path).damage(40, share=(rank, 9))) for rank in range(9)} == {("manifest.json: missing",)}


def test_looking_at_sizes_only_finds_what_is_missing_and_reads_nothing(tmp_path: Path) -> None:
    directory = save(tmp_path, 40)
    (directory / "rollout.h5").write_bytes(b"x" * len(FILES["rollout.h5"]))
    assert store(tmp_path).damage(40, contents=False) == []
    (directory / "empty").unlink()
    assert store(tmp_path).damage(40, contents=False) == ["empty: missing"]


def test_damaged_checkpoint_is_set_aside_whole_and_never_pruned(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        save(tmp_path, 40, content=content)
        store(tmp_path).set_aside(40, f"{content.decode()}: bad")
    save(tmp_path, 41)
    save(tmp_path, 42)
    store(tmp_path).prune(1, 0, None)
    store(tmp_path).clean()
    assert store(tmp_path).steps() == [42]
    assert _names(tmp_path) == ["damaged-000040-1", "damaged-000040-2", "step-000042"]
    first = tmp_path / "checkpoints/grpo/damaged-000040-1"
    assert (first / "why.txt").read_text() == "first: bad\n"
    assert (first / "rollout.h5").read_bytes() == FILES["rollout.h5"] + b"first"


def test_checkpoint_that_a_person_names(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no checkpoint of step 7: .* holds none"):
        store(tmp_path).require(7)
    for step in (20, 40, 60):
        save(tmp_path, step)
    with pytest.raises(
        RunError, match="'grpo' has no checkpoint of step 45; the nearest: step 40 and step 60"
    ) as caught:
        store(tmp_path).require(45)
    assert caught.value.fix == "choose one of 20, 40, 60"
    with pytest.raises(RunError, match=r"the nearest: step 60\n"):
        store(tmp_path).require(61)
    assert store(tmp_path).require(40).info.step == 40
    (store(tmp_path).path(40) / "empty").unlink()
    with pytest.raises(DamagedError, match="step 40 is damaged: empty: missing"):
        store(tmp_path).require(40)


# Commit: refusals


def test_file_that_a_rank_says_it_wrote_and_nobody_sees_is_refused(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    draft = build(checkpoints, 40)
    with pytest.raises(RunError, match=r"__7_0\.distcp is missing, and the rank that wrote it says 9 bytes") as caught:
        checkpoints.commit(draft, info(40), {"trainer/__7_0.distcp": FileSum(9, "")})
    assert "all nodes share" in str(caught.value.fix)
    with pytest.raises(RunError, match=r"rollout\.h5 has 6 bytes, and the rank that wrote it says 9 bytes"):
        checkpoints.commit(draft, info(40), {"rollout.h5": FileSum(9, "")})
    checkpoints.abandon(draft)
    assert _names(tmp_path) == []


def test_overtaken_attempt_changes_nothing(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with Claim.acquire(paths) as first:
        fence = Fence(paths, first.number)
        save(tmp_path, 20, fence=fence)
        save(tmp_path, 40, fence=fence)
        old = store(tmp_path, fence)
        draft = build(old, 60)
    with Claim.acquire(paths) as second:
        save(tmp_path, 60, fence=Fence(paths, second.number))
        before = _names(tmp_path)
        for change in (
            lambda: old.commit(draft, info(60), {}),
            lambda: old.draft(61),
            lambda: old.prune(1, 0, None),
            lambda: old.set_aside(40, "x"),
            old.clean,
        ):
            with pytest.raises(Overtaken, match="a newer attempt drives run"):
                change()
        assert _names(tmp_path) == before
        assert store(tmp_path).damage(60) == []


@pytest.mark.parametrize("there", ["intact", "damaged"])
def test_checkpoint_that_is_there_already_is_replaced(tmp_path: Path, there: str) -> None:
    directory = save(tmp_path, 40, content=b"old")
    if there == "damaged":
        (directory / MANIFEST).unlink()
    save(tmp_path, 40, content=b"new")
    assert _contents(directory)["rollout.h5"].endswith(b"new")
    assert store(tmp_path).damage(40) == []
    assert _names(tmp_path) == ["step-000040"]


# Killed at every change of the file system


def test_commit_killed_anywhere_leaves_the_checkpoints_as_before_or_the_new_one(tmp_path: Path) -> None:
    save(tmp_path, 20)
    seen: list[list[int]] = []
    for _ in killed_at_every_change(lambda: save(tmp_path, 40)):
        store(tmp_path).clean()
        seen.append(store(tmp_path).steps())
        assert all(store(tmp_path).damage(step) == [] for step in seen[-1])
        assert _names(tmp_path) == [f"step-{step:06d}" for step in seen[-1]]
        shutil.rmtree(store(tmp_path).path(40), ignore_errors=True)
    assert [20] in seen and seen == sorted(seen)
    assert len(seen) > 2 * len(FILES)


def test_replacement_killed_anywhere_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    save(tmp_path, 40, content=b"old")
    held = []
    for _ in killed_at_every_change(lambda: save(tmp_path, 40, content=b"new")):
        store(tmp_path).clean()
        assert store(tmp_path).damage(40) == []
        assert _names(tmp_path) == ["step-000040"]
        held.append(_contents(store(tmp_path).path(40))["rollout.h5"][-3:])
        save(tmp_path, 40, content=b"old")
    assert held == sorted(held, reverse=True)
    assert {b"old", b"new"} == set(held)


def test_pruning_killed_anywhere_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    left = []
    for _ in killed_at_every_change(lambda: store(tmp_path).prune(1, 0, None)):
        left.append(store(tmp_path).steps())
        assert all(store(tmp_path).damage(step) == [] for step in left[-1])
        store(tmp_path).clean()
        assert _names(tmp_path) == [f"step-{step:06d}" for step in left[-1]]
        for step in (1, 2):
            save(tmp_path, step)
    assert {(1, 2, 3), (2, 3), (3,)} == set(map(tuple, left))


# Disks that refuse

SAVE_ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from miles.errors import RunError
from tests.runs.checkpoint_files import FILES, build, info, save, store
root = Path(sys.argv[1])
save(root, 20)
checkpoints = store(root)
draft = build(checkpoints, 40)
if sys.argv[2] == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
else:
    with (root / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096) == 4096:
                pass
        except OSError:
            pass
try:
    checkpoints.commit(draft, info(40), {})
except RunError as error:
    print(error.message)
    print(error.fix)
checkpoints.abandon(draft)
print(checkpoints.steps(), checkpoints.damage(20))
"""


@pytest.mark.parametrize(
    ("disk", "reason", "fix"),
    [
        ("full", "No space left on device", "free some space there, or use a directory on another disk (runs_dir)"),
        ("read-only", "Read-only file system", "make it writable, or use another directory (runs_dir)"),
    ],
)
def test_disk_that_refuses_is_a_clear_error_and_leaves_the_older_checkpoint(
    tmp_path: Path, disk: str, reason: str, fix: str
) -> None:
    """On a real file system of 256 KiB, mounted in a namespace of the test's own."""
    mount = f'mount -t tmpfs -o size=256k none "{tmp_path}" && exec "$@"'
    namespace = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not let a user mount a small file system")
    command = [*namespace, sys.executable, "-c", SAVE_ON_A_SMALL_DISK, str(tmp_path), disk]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    commit, told, left = done.stdout.splitlines()
    assert commit.startswith("cannot write ") and commit.endswith(f": {reason}")
    assert told == fix
    assert left == "[20] []"


# Retention

finite = st.floats(allow_nan=False)
metrics = st.dictionaries(st.integers(1, 200), st.none() | st.just(math.nan) | finite, max_size=30)


@given(metrics, st.integers(1, 5), st.integers(0, 20))
def test_retention_keeps_what_it_says_and_nothing_else(
    values: dict[int, float | None], keep_last: int, keep_every: int
) -> None:
    kept = steps_to_keep(values, keep_last, keep_every)
    newest = sorted(values, reverse=True)[:keep_last]
    multiples = [step for step in values if keep_every and step % keep_every == 0]
    measured = {step: value for step, value in values.items() if value is not None and value == value}
    best = [max(step for step, value in measured.items() if value == max(measured.values()))] if measured else []
    assert kept == {*newest, *multiples, *best}


def test_pruning_keeps_the_newest_the_multiples_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step, metrics={"eval/reward": 0.9} if step in (3, 7) else {"loss": float(step)})
    assert store(tmp_path).prune(2, 4, "eval/reward") == [1, 2, 3, 5, 6]
    assert store(tmp_path).steps() == [4, 7, 8, 9, 10]
    assert store(tmp_path).prune(1, 0, None) == [4, 7, 8, 9]
    assert store(tmp_path).prune(1, 0, None) == []
    assert _names(tmp_path) == ["step-000010"]


def test_checkpoint_with_a_damaged_manifest_does_not_push_out_intact_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (store(tmp_path).path(3) / MANIFEST).write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert store(tmp_path).prune(1, 0, None) == [1]
    assert store(tmp_path).steps() == [2, 3]
    assert "step-000003/manifest.json: not what was written" in caplog.text


# Copies


def test_copy_is_the_same_checkpoint_by_links_that_survive_the_original(tmp_path: Path) -> None:
    source, target = store(tmp_path / "a"), store(tmp_path / "b")
    original = save(tmp_path / "a", 40)
    copied = target.copy(source, 40)
    assert target.read(40) == source.read(40)
    assert (copied / "rollout.h5").samefile(original / "rollout.h5")
    shutil.rmtree(original)
    assert target.damage(40) == []


def test_copy_to_another_disk_is_of_the_bytes(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this system has no second file system that a test may write to")
    save(tmp_path, 40)
    other = memory / f"miles-test-{os.getpid()}"
    try:
        target = store(other)
        target.copy(store(tmp_path), 40)
        assert target.damage(40) == []
        assert _contents(target.path(40)) == FILES
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_damaged_checkpoint_is_not_copied(tmp_path: Path) -> None:
    (save(tmp_path / "a", 40) / "empty").unlink()
    target: CheckpointStore = store(tmp_path / "b")
    with pytest.raises(DamagedError, match="empty: missing"):
        target.copy(store(tmp_path / "a"), 40)
    assert target.steps() == []
