import shutil
from pathlib import Path

import pytest

from miles.errors import RunError
from miles.runs.manifest import DamagedError
from miles.runs.metrics import MetricsWriter, read_metrics
from miles.runs.paths import RunPaths
from miles.runs.rewind import copy_checkpoint, rewind
from miles.runs.samples import sampled_steps, write_samples
from tests.runs.checkpoint_files import killed_at_every_change, save, store


def _stage(root: Path) -> RunPaths:
    """A stage that has trained six steps, with checkpoints of steps 2, 4 and 6."""
    paths = RunPaths(root)
    root.mkdir(exist_ok=True)
    writer = MetricsWriter(paths, clock=lambda: 1.0)
    writer.write("warmup", 1, {"loss": 1.0})
    writer.write("grpo", 0, {"eval/reward": 0.0})
    for step in range(1, 7):
        journal = paths.journal("grpo") / f"step-{step:06d}"
        journal.mkdir(parents=True)
        (journal / "batch-00.h5").write_text(f"batch {step}")
        writer.write("grpo", step, {"loss": 1.0 / step})
        write_samples(paths, "grpo", step, [])
        if step % 2 == 0:
            save(root, step)
    return paths


def _journaled(paths: RunPaths) -> list[int]:
    return sorted(int(path.name[5:]) for path in paths.journal("grpo").iterdir())


def _recorded(paths: RunPaths) -> list[tuple[str, int]]:
    return [(line.stage, line.step) for line in read_metrics(paths)]


def test_stage_is_as_it_was_at_the_checkpoint_and_the_rest_is_kept(tmp_path: Path) -> None:
    paths = _stage(tmp_path)
    aside = rewind(paths, "grpo", 2)
    assert aside == tmp_path / "discarded/grpo-1"
    assert store(tmp_path).steps() == [2]
    assert _journaled(paths) == [1, 2]
    assert _recorded(paths) == [("warmup", 1), ("grpo", 0), ("grpo", 1), ("grpo", 2)]
    assert sampled_steps(paths, "grpo") == [1, 2]
    kept = RunPaths(aside)
    assert [line.step for line in read_metrics(kept)] == [3, 4, 5, 6]
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert (aside / "journal/step-000003/batch-00.h5").read_text() == "batch 3"
    assert (aside / "checkpoints/step-000006/manifest.json").is_file()


def test_each_rewind_has_its_own_directory_and_one_that_changes_nothing_has_none(tmp_path: Path) -> None:
    paths = _stage(tmp_path)
    assert rewind(paths, "grpo", 6) is None
    assert not paths.discarded.exists()
    rewind(paths, "grpo", 4)
    assert rewind(paths, "grpo", 2) == paths.discarded / "grpo-2"
    assert [line.step for line in read_metrics(RunPaths(paths.discarded / "grpo-2"))] == [3, 4]


def test_rewind_to_the_beginning_needs_no_checkpoint(tmp_path: Path) -> None:
    paths = _stage(tmp_path)
    rewind(paths, "grpo", 0)
    assert store(tmp_path).steps() == _journaled(paths) == sampled_steps(paths, "grpo") == []
    assert _recorded(paths) == [("warmup", 1)]
    assert rewind(paths, "never-ran", 0) is None


def test_metrics_alone_are_kept_too(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    MetricsWriter(paths).write("grpo", 1, {"loss": 1.0})
    assert rewind(paths, "grpo", 0) == paths.discarded / "grpo-1"
    assert len(read_metrics(RunPaths(paths.discarded / "grpo-1"))) == 1


def test_step_without_an_intact_checkpoint_is_refused_and_nothing_moves(tmp_path: Path) -> None:
    paths = _stage(tmp_path)
    (store(tmp_path).path(2) / "rollout.h5").unlink()
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(RunError, match="'grpo' has no checkpoint of step 3; the nearest: step 2 and step 4"):
        rewind(paths, "grpo", 3)
    with pytest.raises(DamagedError, match=r"rollout\.h5: missing"):
        rewind(paths, "grpo", 2)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_rewind_killed_anywhere_continues_from_a_step_between_and_can_be_repeated(tmp_path: Path) -> None:
    shutil.copytree(_stage(tmp_path / "stage").root, tmp_path / "run")
    paths, reached = RunPaths(tmp_path / "run"), set()
    for _ in killed_at_every_change(lambda: rewind(paths, "grpo", 2)):
        journaled = _journaled(paths)
        assert journaled == list(range(1, len(journaled) + 1)), "a journal without a gap"
        reached.add((max(store(paths.root).steps()), len(journaled), len(_recorded(paths))))
        rewind(paths, "grpo", 2)
        assert store(paths.root).steps() == [2]
        assert _journaled(paths) == [1, 2]
        assert _recorded(paths)[-1] == ("grpo", 2)
        moved = sorted(path.name for path in paths.discarded.glob("grpo-*/journal/*"))
        assert moved == [f"step-{step:06d}" for step in (3, 4, 5, 6)]
        shutil.rmtree(paths.root)
        shutil.copytree(tmp_path / "stage", paths.root)
    assert {(6, 6, 8), (4, 6, 8), (2, 6, 8), (2, 5, 8), (2, 2, 8), (2, 2, 4)} <= reached


def test_copy_brings_a_checkpoint_and_its_metrics_into_another_run(tmp_path: Path) -> None:
    source, target = _stage(tmp_path / "a"), RunPaths(tmp_path / "b")
    target.root.mkdir()
    MetricsWriter(target).write("warmup", 7, {"loss": 1.0})
    for _ in range(2):  # repeated after an interruption
        copied = copy_checkpoint(source, target, "grpo", 4)
        assert copied == store(target.root).path(4)
        assert store(target.root).damage(4) == []
        assert _recorded(target) == [("warmup", 7), *(("grpo", step) for step in range(5))]
    with pytest.raises(RunError, match="the nearest: step 4 and step 6"):
        copy_checkpoint(source, target, "grpo", 5)
