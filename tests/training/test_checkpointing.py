"""When a stage saves and what it restores, with the real FSDP2 trainer on one rank and a real run directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from test_fsdp_backend import one_rank, train_section, update, weights

from miles.config.schema import CheckpointSection
from miles.errors import RunError
from miles.runs.checkpoints import CheckpointStore
from miles.runs.claim import Fence
from miles.runs.paths import RunPaths
from miles.training.backend import PendingSave
from miles.training.checkpointing import Checkpointer
from miles.training.context import Context
from miles.training.distributed import StopRequest
from miles.training.fsdp.backend import FsdpBackend
from miles.workflow.fingerprint import Inputs
from miles.workflow.stage import write_inputs

STAGE = "warmup"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Iterator[Path]:
    with one_rank():
        yield reference.build_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture
def context(tmp_path) -> Context:
    paths = RunPaths(tmp_path / "run")
    write_inputs(paths, STAGE, Inputs(version="1", config="c", budget=None, files={}, steps={}))
    return Context(
        name=STAGE,
        seed=0,
        run_name="run",
        paths=paths,
        device=torch.device("cpu"),
        stop=StopRequest(),
        attempt=3,
        fence=Fence(paths, None),
        engines_file=tmp_path / "engines.json",
    )


def new_trainer(model_dir: Path) -> FsdpBackend:
    return FsdpBackend(model_dir, train_section(device="cpu"), seed=0)


def checkpointer(context: Context, trainer: FsdpBackend, **section: object) -> Checkpointer:
    return Checkpointer(context, CheckpointSection.model_validate(section), trainer, backend="fsdp")


def train(trainer: FsdpBackend) -> None:
    update(trainer, reference.micro_batches(reference.sequences(), 2, 0, 1))


def saved(context: Context, trainer: FsdpBackend, steps: int) -> dict[int, dict[str, torch.Tensor]]:
    """Save after each of some steps; the weights of each."""
    saver = checkpointer(context, trainer, keep_last=steps)
    held = {}
    for step in range(1, steps + 1):
        train(trainer)
        saver.begin(step, metrics={"loss": float(step)})
        held[step] = weights(trainer)
        saver.complete()
    return held


def store(context: Context) -> CheckpointStore:
    return CheckpointStore(context.paths, STAGE, context.fence)


def assert_equal(trainer: FsdpBackend, expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(weights(trainer), expected, rtol=0, atol=0)


def damage(context: Context, step: int) -> None:
    file = next(store(context).path(step).glob("trainer/*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_stage_without_checkpoints_begins_with_its_model(model_dir, context) -> None:
    restored = checkpointer(context, new_trainer(model_dir)).restore()
    assert (restored.step, restored.directory) == (0, None)


def test_the_newest_checkpoint_is_restored_and_says_where_it_came_from(model_dir, context) -> None:
    held = saved(context, new_trainer(model_dir), steps=2)
    fresh = new_trainer(model_dir)
    restored = checkpointer(context, fresh).restore()
    assert restored.step == 2
    assert_equal(fresh, held[2])
    info = store(context).read(2).info
    assert (info.stage, info.step, info.attempt, info.backend, info.world_size) == (STAGE, 2, 3, "fsdp", 1)
    assert info.metrics == {"loss": 2.0}


def test_a_save_holds_the_state_of_its_beginning_and_is_committed_when_it_is_written(model_dir, context) -> None:
    trainer = new_trainer(model_dir)
    saver = checkpointer(context, trainer)
    train(trainer)
    saver.begin(1)
    at_save = weights(trainer)
    train(trainer)
    committed = None
    while committed is None:
        committed = saver.poll()
        time.sleep(0.01)
    assert committed == 1
    fresh = new_trainer(model_dir)
    assert checkpointer(context, fresh).restore().step == 1
    assert_equal(fresh, at_save)


def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_taken(model_dir, context, caplog) -> None:
    held = saved(context, new_trainer(model_dir), steps=3)
    damage(context, 2)
    damage(context, 3)
    fresh = new_trainer(model_dir)
    assert checkpointer(context, fresh).restore().step == 1
    assert_equal(fresh, held[1])
    assert store(context).steps() == [1]
    assert "step 3 is damaged" in caplog.text and ".distcp" in caplog.text


def test_without_an_intact_checkpoint_nothing_begins_and_nothing_is_touched(model_dir, context) -> None:
    saved(context, new_trainer(model_dir), steps=2)
    damage(context, 1)
    damage(context, 2)
    for _ in range(2):
        with pytest.raises(RunError, match=r"(?s)no checkpoint of 'warmup' is intact.*--from start"):
            checkpointer(context, new_trainer(model_dir)).restore()
    assert store(context).steps() == [1, 2]


def test_a_disk_that_refuses_costs_the_save_and_not_the_run(model_dir, context, caplog) -> None:
    trainer = new_trainer(model_dir)
    saver = checkpointer(context, trainer)
    obstacle = context.paths.checkpoints(STAGE)
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the directory belongs")
    train(trainer)
    saver.begin(1)
    assert saver.complete() is None
    assert (saver.failures, saver.saved_step) == (1, 0)
    assert "step 1 could not be saved; the run goes on" in caplog.text
    obstacle.unlink()
    saver.begin(2)
    assert saver.complete() == 2


def test_fixed_intervals_requests_and_what_is_saved_already(model_dir, context) -> None:
    trainer = new_trainer(model_dir)
    saver = checkpointer(context, trainer, every=3)
    assert [step for step in range(1, 8) if saver.due(step)] == [3, 6]
    context.paths.save_request.touch()
    assert saver.due(4)
    saver.begin(4)
    saver.complete()
    assert not context.paths.save_request.exists()
    assert not saver.due(4)


def test_a_save_that_had_begun_does_not_answer_a_later_request(model_dir, context) -> None:
    saver = checkpointer(context, new_trainer(model_dir))
    saver.begin(1)
    time.sleep(0.02)
    context.paths.save_request.touch()
    assert saver.complete() == 1
    assert context.paths.save_request.exists()


def test_automatic_intervals_begin_with_a_first_save(model_dir, context) -> None:
    saver = checkpointer(context, new_trainer(model_dir), mtbf_hours=1.0)
    assert saver.due(1)
    saver.begin(1)
    saver.complete()
    assert not saver.due(2)
    often = checkpointer(context, new_trainer(model_dir), mtbf_hours=1e-9)
    often.restore()
    assert often.due(2)


def test_automatic_intervals_weigh_the_stall_and_wait_for_the_save_in_progress(model_dir, context, monkeypatch) -> None:
    """With a failure every 5 s, a stall of up to 0.3 s is worth a save every 2 s; the 2 s of writing are not."""
    trainer = new_trainer(model_dir)
    begin = trainer.begin_save

    def slowly(directory: Path) -> PendingSave:
        pending = begin(directory)
        write = pending.write
        monkeypatch.setattr(pending, "write", lambda: (time.sleep(2.0), write()))
        return pending

    monkeypatch.setattr(trainer, "begin_save", slowly)
    saver = checkpointer(context, trainer, mtbf_hours=5 / 3600)
    saver.begin(1)
    assert not saver.due(2)
    while saver.poll() is None:
        time.sleep(0.01)
    info = store(context).read(1).info
    assert 0 < info.stall_seconds < 0.5 and info.save_seconds > 2.0
    assert saver.due(2)


def test_the_last_save_is_made_when_time_suffices(model_dir, context) -> None:
    trainer = new_trainer(model_dir)
    saver = checkpointer(context, trainer)
    assert saver.save_last(0)
    train(trainer)
    assert saver.save_last(1)
    assert store(context).steps() == [1]


def test_the_last_save_is_left_to_the_journal_when_time_is_short(model_dir, context, caplog) -> None:
    trainer = new_trainer(model_dir)
    saver = checkpointer(context, trainer)
    train(trainer)
    saver.begin(1)
    saver.complete()
    context = replace(context, stop=StopRequest(deadline=time.time()))
    saver = checkpointer(context, trainer)
    saver.restore()
    train(trainer)
    assert not saver.save_last(2)
    assert store(context).steps() == [1]
    assert "no time for a last save" in caplog.text
