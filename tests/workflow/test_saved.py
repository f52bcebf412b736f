import threading
import time
from collections.abc import Iterator

import pytest

from miles.config.schema import RunConfig
from miles.errors import RunError
from miles.runs.attempts import begin_attempt
from miles.runs.claim import Claim
from miles.runs.manifest import DamagedError
from miles.runs.paths import RunPaths
from miles.workflow.saved import choose_checkpoint, list_checkpoints, newest_checkpoint, save_now
from tests.workflow.training import save


def test_checkpoints_are_listed_with_what_keeps_them(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, config = trained
    save(paths, "grpo", 6, seconds=0.5, **{"eval/reward": 0.2})
    save(paths, "grpo", 8, **{"eval/reward": float("nan")})
    save(paths, "grpo", 9, **{"eval/reward": 0.2})
    save(paths, "grpo", 10, **{"eval/reward": 0.1})
    section = config.steps["grpo"].checkpoint.model_copy(update={"keep_every": 4, "keep_best": "eval/reward"})
    step = config.steps["grpo"].model_copy(update={"checkpoint": section})
    config = config.model_copy(update={"steps": config.steps | {"grpo": step}})
    found = list_checkpoints(paths, config, verify=True)
    assert [(saved.stage, saved.step, saved.kept) for saved in found] == [
        ("warmup", 4, ["last"]),
        ("grpo", 2, []),
        ("grpo", 4, ["every 4"]),
        ("grpo", 6, []),
        ("grpo", 8, ["every 4"]),
        ("grpo", 9, ["last", "best eval/reward"]),
        ("grpo", 10, ["last"]),
    ]
    assert not any(saved.damage for saved in found)
    assert (found[3].bytes, found[3].save_seconds) == (len("weights after step 6"), 0.5)


def test_damage_is_shown_and_only_contents_need_verifying(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, config = trained
    (paths.checkpoints("grpo") / "step-000002/trainer/state").write_text("weights after step 3")
    (paths.checkpoints("grpo") / "step-000004/manifest.json").write_text("{")
    for verify, damaged in ((False, [4]), (True, [2, 4])):
        found = list_checkpoints(paths, config, verify=verify)
        assert [saved.step for saved in found if saved.damage] == damaged
    assert found[-1].bytes is None
    newest = newest_checkpoint(paths, "grpo")
    assert newest is not None
    assert newest[0] == 2


def test_checkpoint_is_the_newest_of_the_last_stage_unless_it_is_named(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, config = trained
    assert choose_checkpoint(paths, config, None, None) == ("grpo", 4)
    assert choose_checkpoint(paths, config, None, 2) == ("grpo", 2)
    assert choose_checkpoint(paths, config, "warmup", None) == ("warmup", 4)
    (paths.checkpoints("grpo") / "step-000004/trainer/state").unlink()
    with pytest.raises(DamagedError):
        choose_checkpoint(paths, config, None, None)


@pytest.fixture
def running(trained: tuple[RunPaths, RunConfig]) -> Iterator[RunPaths]:
    paths, _ = trained
    with Claim.acquire(paths):
        begin_attempt(paths, "grpo")
        yield paths


def test_save_waits_for_a_checkpoint_that_began_after_it_was_asked(running: RunPaths) -> None:
    def train() -> None:
        _wait_for_request(running)
        save(running, "grpo", 6, seconds=100.0)  # had begun before, and is no answer
        save(running, "grpo", 7)
        running.save_request.unlink()

    trainer = threading.Thread(target=train)
    trainer.start()
    saved = save_now(running, timeout=60.0)
    trainer.join()
    assert (saved.stage, saved.step) == ("grpo", 7)
    assert saved.directory == str(running.checkpoints("grpo") / "step-000007")
    assert not running.save_request.exists()


def _wait_for_request(paths: RunPaths) -> None:
    deadline = time.monotonic() + 30
    while not paths.save_request.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_save_that_does_not_come_takes_its_request_back(running: RunPaths) -> None:
    with pytest.raises(RunError, match=r"has not saved within 0\.3 s"):
        save_now(running, timeout=0.3)
    assert not running.save_request.exists()


def test_only_a_running_stage_can_save(trained: tuple[RunPaths, RunConfig]) -> None:
    paths, _ = trained
    with pytest.raises(RunError, match="run 'demo' is not running"):
        save_now(paths, timeout=1.0)
    with Claim.acquire(paths):
        begin_attempt(paths, "report")
        with pytest.raises(RunError, match="step 'report' is running, and a step of kind report has no checkpoints"):
            save_now(paths, timeout=1.0)
    assert not paths.save_request.exists()
