import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_records import PROMPTS, batch, batch_facts, facts, finished, journal, partial
from runs.checkpoint_files import killed_at_every_change

from miles.data.sample import Group, Prompt
from miles.errors import DataError, RunError
from miles.runs.claim import Claim, Fence, Overtaken
from miles.runs.journal import Batch, Dropped, Journal
from miles.runs.paths import RunPaths

TOKENS = 40

few = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])


def step_files(root: Path, step: int = 1) -> list[str]:
    return sorted(path.name for path in (root / f"journal/grpo/step-{step:06d}").iterdir())


def segments(root: Path, step: int = 1) -> list[Path]:
    return sorted((root / f"journal/grpo/step-{step:06d}").glob("segment-*.h5"))


def batch_file(root: Path, step: int = 1) -> Path:
    (path,) = (root / f"journal/grpo/step-{step:06d}").glob("batch-*.h5")
    return path


def begins(sample, whole) -> bool:
    """Whether a sample is the beginning of another one."""
    count = len(sample.response_tokens)
    lists = ("response_tokens", "log_probs", "loss_mask", "weight_versions")
    return all(getattr(sample, name) == getattr(whole, name)[:count] for name in lists)


# Segments


def test_flush_writes_what_is_new_and_nothing_when_nothing_is(tmp_path: Path) -> None:
    log, whole = journal(tmp_path), finished(1)
    assert log.flush(1, [partial(whole, 10)]) > 0
    assert log.flush(1, [partial(whole, 10)]) == 0
    assert log.flush(1, [partial(whole, 20)]) > 0
    assert [path.name.split("-")[1] for path in segments(tmp_path)] == ["000001", "000002"]


def test_later_segment_holds_only_the_tokens_since_the_last(tmp_path: Path) -> None:
    whole = finished(1, tokens=20_000)
    log = journal(tmp_path)
    first = log.flush(1, [partial(whole, 19_000)])
    second = log.flush(1, [partial(whole, 19_500)])
    assert second < first / 10


@few
@given(
    st.lists(st.tuples(st.integers(0, TOKENS + 1), st.integers(0, TOKENS + 1), st.booleans()), min_size=1, max_size=6)
)
def test_open_step_is_what_was_flushed_whoever_flushed_it(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, int, bool]]
) -> None:
    """Two groups that grow (or begin anew) from flush to flush, some of them by a new attempt."""
    root = tmp_path_factory.mktemp("run")
    log = journal(root)
    for first, second, new_attempt in history:
        if new_attempt:
            log = journal(root)
        now = [partial(finished(1), first), partial(finished(2, prompt="", routes=False), second)]
        log.flush(1, now)
        assert [facts(group) for group in journal(root).read_open(1).groups] == [facts(group) for group in now]


def test_attempt_that_continues_writes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    whole = finished(1, tokens=20_000)
    first = journal(tmp_path).flush(1, [partial(whole, 19_000)])
    second = journal(tmp_path)
    found = second.read_open(1)
    assert second.flush(1, found.groups) == 0
    assert second.flush(1, [partial(whole, 19_100)]) < first / 10
    assert len(segments(tmp_path)) == 2


def test_sample_that_was_begun_anew_replaces_what_was_there(tmp_path: Path) -> None:
    log = journal(tmp_path)
    log.flush(1, [partial(finished(1), 30)])
    other = finished(2)
    again = Group(other.prompt, other.samples, position=1)
    log.flush(1, [again])
    assert facts(journal(tmp_path).read_open(1).groups[0]) == facts(
        Group(again.prompt, again.samples, position=1, born=1)
    )


def test_dropped_positions_are_written_once(tmp_path: Path) -> None:
    log = journal(tmp_path)
    dropped = [Dropped(5, "a", "zero-variance", "0 0"), Dropped(3, "ä/\U0001f600", "quarantined", "timed out")]
    assert log.flush(1, [finished(3)], dropped[:1]) > 0
    assert log.flush(1, [finished(3)], dropped) > 0
    assert log.flush(1, [finished(3)], dropped) == 0
    found = journal(tmp_path).read_open(1)
    assert found.dropped == [dropped[1], dropped[0]]
    assert [group.position for group in found.groups] == [3]


def test_carried_group_is_written_when_it_has_changed_and_then_whole(tmp_path: Path) -> None:
    log, whole = journal(tmp_path), finished(7)
    log.commit(batch(1, [1], carried=[partial(whole, 10)]))
    for writer in (log, journal(tmp_path)):
        writer.read_batch(1)
        assert writer.flush(2, [partial(whole, 10)]) == 0
    assert log.flush(2, [partial(whole, 20)]) > 0
    assert facts(journal(tmp_path).read_open(2).groups[0]) == facts(partial(whole, 20))


def test_flush_whose_file_appeared_though_it_failed_is_repeated(tmp_path: Path, monkeypatch) -> None:
    log, whole = journal(tmp_path), finished(1)
    log.flush(1, [partial(whole, 10)])

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("miles.runs.journal.files.sync_directory", fails)
        with pytest.raises(RunError, match="cannot write"):
            log.flush(1, [partial(whole, 20)])
    log.flush(1, [partial(whole, 30)])
    assert len(segments(tmp_path)) == 3
    assert facts(journal(tmp_path).read_open(1).groups[0]) == facts(partial(whole, 30))


# Damage


def damages(path: Path) -> list[bytes]:
    """What may be left of a file; test_journal_files.py finds many more."""
    data = path.read_bytes()
    middle = len(data) // 2
    return [b"", data[:middle], data[:-1], data + b"\0", data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]]


def test_damage_of_a_batch_is_found_named_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal(tmp_path).commit(batch(1, [1]))
    path = batch_file(tmp_path)
    whole = path.read_bytes()
    for data in damages(path):
        path.write_bytes(data)
        caplog.clear()
        assert journal(tmp_path).read_batch(1) is None
        assert path.name in caplog.text
        assert step_files(tmp_path) == [path.name + ".damaged"]
        assert journal(tmp_path).steps() == []
        path.with_name(path.name + ".damaged").unlink()
        path.write_bytes(whole)
    assert journal(tmp_path).read_batch(1) is not None


def test_damage_of_a_segment_is_found(tmp_path: Path) -> None:
    journal(tmp_path).flush(1, [finished(1)])
    (path,) = segments(tmp_path)
    for data in damages(path):
        path.write_bytes(data)
        assert journal(tmp_path).read_open(1).groups == []
        path.with_name(path.name + ".damaged").unlink()


@few
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=6), st.sets(st.integers(0, 5), max_size=3), st.integers(0, TOKENS)
)
def test_lost_segments_leave_the_beginnings_of_samples_and_the_step_can_go_on(
    tmp_path_factory: pytest.TempPathFactory, growth: list[int], lost: set[int], more: int
) -> None:
    root, whole = tmp_path_factory.mktemp("run"), finished(1)
    log, count = journal(root), 0
    for tokens in growth:
        count += tokens
        log.flush(1, [partial(whole, count)])
    for number, path in enumerate(segments(root)):
        if number in lost:
            path.write_bytes(b"")
    after = journal(root)
    found = after.read_open(1)
    assert all(begins(*pair) for group in found.groups for pair in zip(group.samples, whole.samples, strict=True))
    if found.groups:
        first_lost = min((number for number in lost if number < len(segments(root)) + len(lost)), default=len(growth))
        assert len(found.groups[0].samples[0].response_tokens) == min(TOKENS, sum(growth[:first_lost]))
    after.flush(1, [partial(whole, more)])
    after.flush(1, [whole])
    assert facts(journal(root).read_open(1).groups[0]) == facts(whole)


def test_gap_is_logged_with_who_it_concerns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, whole = journal(tmp_path), finished(1)
    for count in (10, 20, 30):
        log.flush(1, [partial(whole, count)])
    segments(tmp_path)[1].unlink()
    found = journal(tmp_path).read_open(1)
    assert [len(sample.response_tokens) for sample in found.groups[0].samples] == [10, 10]
    assert "sample 1 of position 1: 1 deltas follow what is lost" in caplog.text


def test_damaged_batch_leaves_what_its_segments_hold(tmp_path: Path) -> None:
    log = journal(tmp_path)
    log.flush(1, [finished(1)])
    held = segments(tmp_path)[0]
    data = held.read_bytes()
    log.commit(batch(1, [1]))
    held.write_bytes(data)  # as if it was killed before it removed the segment
    assert journal(tmp_path).read_open(1).groups == []
    batch_file(tmp_path).write_bytes(b"")
    after = journal(tmp_path)
    assert after.read_batch(1) is None
    assert [facts(group) for group in after.read_open(1).groups] == [facts(finished(1))]


def test_decision_that_was_replaced_does_not_come_back_when_the_newer_one_is_damaged(tmp_path: Path) -> None:
    log = journal(tmp_path)
    log.commit(batch(1, [1]))
    old, data = batch_file(tmp_path), batch_file(tmp_path).read_bytes()
    log.commit(batch(1, [2]))
    new = batch_file(tmp_path)
    old.write_bytes(data)  # as if it was killed before it removed the old one
    assert batch_facts(journal(tmp_path).read_batch(1)) == batch_facts(batch(1, [2]))
    new.write_bytes(b"")
    assert [journal(tmp_path).read_batch(1) for _ in range(2)] == [None, None]
    journal(tmp_path).commit(batch(1, [3]))
    assert batch_facts(journal(tmp_path).read_batch(1)) == batch_facts(batch(1, [3]))


def test_unknown_prompt_is_an_error_and_no_damage(tmp_path: Path) -> None:
    journal(tmp_path).commit(batch(1, [1]))
    paths = RunPaths(tmp_path)
    with pytest.raises(DataError, match="prompt 'a' had other tokens"):
        Journal(paths, "grpo", Fence(paths, None), PROMPTS | {"a": Prompt("a", [], "")}).read_batch(1)
    assert journal(tmp_path).steps() == [1]


# Commit


def test_commit_replaces_the_segments(tmp_path: Path) -> None:
    log, wanted = journal(tmp_path), batch(1, [3, 1], carried=[partial(finished(9), 11)])
    log.flush(1, [*wanted.groups, *wanted.carried])
    size = log.commit(wanted)
    assert step_files(tmp_path) == [batch_file(tmp_path).name]
    assert batch_file(tmp_path).stat().st_size == size
    assert batch_facts(journal(tmp_path).read_batch(1)) == batch_facts(wanted)
    assert journal(tmp_path).read_open(1).groups == []
    assert journal(tmp_path).read_batch(2) is None


def test_commit_killed_anywhere_loses_nothing(tmp_path: Path) -> None:
    wanted = batch(1, [1, 2])
    seen = []

    def prepare() -> None:
        shutil.rmtree(tmp_path / "journal", ignore_errors=True)
        log = journal(tmp_path)
        for count in (10, 20, 50):
            log.flush(1, [partial(group, count) for group in wanted.groups])

    prepare()
    for _ in killed_at_every_change(lambda: journal(tmp_path).commit(wanted)):
        after = journal(tmp_path)
        seen.append(after.steps())
        if seen[-1]:
            assert batch_facts(after.read_batch(1)) == batch_facts(wanted)
            assert after.read_open(1).groups == []
        else:
            assert [facts(group) for group in after.read_open(1).groups] == [facts(group) for group in wanted.groups]
        journal(tmp_path).commit(batch(2, [5]))  # any later write cleans up
        left = step_files(tmp_path)
        assert len(left) == (1 if seen[-1] else 3) and not any(name.endswith(".tmp") for name in left)
        prepare()
    assert seen == sorted(seen) and seen[0] == [] and seen[-1] == [1]


def test_replacement_killed_anywhere_leaves_the_old_decision_or_the_new_one(tmp_path: Path) -> None:
    held = []
    journal(tmp_path).commit(batch(1, [1]))
    for _ in killed_at_every_change(lambda: journal(tmp_path).commit(batch(1, [2]))):
        held.append([group.position for group in journal(tmp_path).read_batch(1).groups])
        shutil.rmtree(tmp_path / "journal")
        journal(tmp_path).commit(batch(1, [1]))
    assert held == sorted(held) and held[0] == [1] and held[-1] == [2]


def test_flush_killed_anywhere_leaves_the_state_before_or_after(tmp_path: Path) -> None:
    whole, seen = finished(1), []
    journal(tmp_path).flush(1, [partial(whole, 10)])
    for _ in killed_at_every_change(lambda: journal(tmp_path).flush(1, [partial(whole, 20)])):
        found = journal(tmp_path).read_open(1).groups[0]
        seen.append(len(found.samples[0].response_tokens))
        assert facts(found) == facts(partial(whole, seen[-1]))
        shutil.rmtree(tmp_path / "journal")
        journal(tmp_path).flush(1, [partial(whole, 10)])
    assert seen and set(seen) <= {10, 20}


# Fence and disks


def test_process_that_was_overtaken_writes_moves_and_removes_nothing(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    first = Claim.acquire(paths)
    old = journal(tmp_path, Fence(paths, first.number))
    old.commit(batch(1, [1]))
    old.flush(2, [partial(finished(2), 10)])
    first.release()
    with Claim.acquire(paths) as second:
        before = sorted(tmp_path.rglob("*"))
        for act in (
            lambda: old.flush(2, [finished(2)]),
            lambda: old.commit(batch(2, [2])),
            lambda: old.prune(2),
            lambda: old.discard_from(1, "why"),
        ):
            with pytest.raises(Overtaken):
                act()
        assert sorted(tmp_path.rglob("*")) == before
        journal(tmp_path, Fence(paths, second.number)).commit(batch(2, [2]))


WRITE_ON_A_FULL_DISK = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from journal_records import batch, facts, finished, journal, partial
from miles.errors import RunError
root, whole = Path(sys.argv[1]), finished(1, tokens=3000)
log = journal(root)
log.flush(1, [partial(whole, 10)])
with (root / "filler").open("wb", buffering=0) as filler:
    try:
        while filler.write(b"x" * 4096) == 4096:
            pass
    except OSError:
        pass
try:
    log.flush(1, [whole])
except RunError as error:
    print(error.message)
print(facts(journal(root).read_open(1).groups[0]) == facts(partial(whole, 10)))
(root / "filler").unlink()
log.flush(1, [whole])
print(facts(journal(root).read_open(1).groups[0]) == facts(whole))
"""


def test_full_disk_is_a_clear_error_and_the_next_flush_makes_up_for_it(tmp_path: Path) -> None:
    """On a real file system of 512 KiB, mounted in a namespace of the test's own."""
    mount = f'mount -t tmpfs -o size=512k none "{tmp_path}" && exec "$@"'
    namespace = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not let a user mount a small file system")
    here, root = Path(__file__).parent, Path(__file__).parents[3]
    command = [*namespace, sys.executable, "-c", WRITE_ON_A_FULL_DISK, str(tmp_path), str(here), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    refusal, before, after = done.stdout.splitlines()
    assert refusal.startswith("cannot write ") and refusal.endswith("No space left on device")
    assert (before, after) == ("True", "True")


# Retention


def test_prune_removes_the_steps_before_the_first_needed(tmp_path: Path) -> None:
    log = journal(tmp_path)
    for step in (1, 2, 3):
        log.commit(batch(step, [step]))
    assert log.steps() == [1, 2, 3]
    assert log.prune(3) == [1, 2]
    assert log.steps() == [3]
    assert log.prune(3) == []


def test_discard_moves_later_steps_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    log = journal(tmp_path)
    for step in (1, 2):
        log.commit(batch(step, [step]))
    log.flush(3, [partial(finished(3), 5)])
    contents = [path.read_bytes() for path in segments(tmp_path, 3)]
    assert log.discard_from(2, "the journal of step 1 is damaged") == [2, 3]
    assert log.discard_from(2, "nothing is left") == []
    aside = tmp_path / "discarded/grpo-1/journal"
    assert sorted(path.name for path in aside.iterdir()) == ["step-000002", "step-000003", "why.txt"]
    assert (aside / "why.txt").read_text() == "the journal of step 1 is damaged\n"
    assert [path.read_bytes() for path in (aside / "step-000003").iterdir()] == contents
    assert "steps 2, 3: the journal of step 1 is damaged" in caplog.text
    assert log.steps() == [1]
    assert log.flush(3, [partial(finished(3), 5)]) > 0
    assert log.discard_from(1, "again") == [1, 3]
    assert (tmp_path / "discarded/grpo-2/journal/step-000001").is_dir()


def test_open_step_of_nothing_is_empty(tmp_path: Path) -> None:
    found = journal(tmp_path).read_open(1)
    assert (found.groups, found.dropped, journal(tmp_path).steps()) == ([], [], [])


def test_checkpoint_file_and_journal_agree(tmp_path: Path) -> None:
    wanted = Batch(4, [], [partial(finished(9), 11)], [], cursor=10)
    journal(tmp_path).commit(wanted)
    assert batch_facts(journal(tmp_path).read_batch(4)) == batch_facts(wanted)
