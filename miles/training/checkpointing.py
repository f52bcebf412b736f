"""Saving and restoring a stage of training: when, in the background, and which checkpoint counts.

Owns the order of things among the ranks. Files and their verification belong to `miles.runs.checkpoints`, the trainer's
own files to its backend. All methods are collective unless they say otherwise.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from miles.config.schema import CheckpointSection
from miles.errors import RunError
from miles.runs.attempts import read_attempts
from miles.runs.checkpoints import CheckpointStore
from miles.runs.claim import Overtaken
from miles.runs.files import disk_errors
from miles.runs.manifest import CheckpointInfo, FileSum, sum_files
from miles.runs.trackers import tracker_ids
from miles.training.backend import PendingSave, TrainerBackend
from miles.training.context import Context
from miles.training.distributed import from_rank_zero, raise_together, together
from miles.training.interval import mean_time_between_failures, save_interval
from miles.workflow.stage import stage_fingerprint

log = logging.getLogger(__name__)

TRAINER_STATE = "trainer"
"""In a checkpoint: the directory of the backend's files."""

Extra = Callable[[Path], None]
"""Writes what else belongs into a checkpoint's directory; rank 0 only."""


@dataclass(frozen=True, slots=True)
class Restored:
    """Where a stage goes on from."""

    step: int
    """Training steps that the trainer's state contains; 0: none, it is the initial model."""
    directory: Path | None


class Checkpointer:
    """The checkpoints of one stage, seen from one rank."""

    def __init__(self, context: Context, section: CheckpointSection, trainer: TrainerBackend, *, backend: str) -> None:
        self.failures = 0
        """Saves that failed in this attempt."""
        self._context = context
        self._section = section
        self._trainer = trainer
        self._backend = backend
        self._store = CheckpointStore(context.paths, context.name, context.fence)
        self._writing: _Writing | None = None
        self._saved_step = 0
        self._save_seconds: float | None = None
        self._stall_seconds = 0.0
        self._last_began = time.monotonic()

    def restore(self) -> Restored:
        """Load the newest checkpoint that is intact.

        Damaged newer ones are named in the log and set aside. Raises RunError when there are checkpoints and none is
        intact: beginning anew is then for the user to say.
        """
        steps = self._steps()
        damaged: dict[int, list[str]] = {}
        for step in reversed(steps):
            damage = self._damage(step)
            if not damage:
                self._set_aside(damaged)
                return self._load(step)
            damaged[step] = damage
        if damaged:
            raise self._all_damaged(damaged)
        return Restored(0, None)

    def due(self, step: int, *, repeated_fraction: float = 1.0) -> bool:
        """Whether the state after `step` is to be saved now; the same answer on every rank.

        With `every = "auto"` the first save comes after the first step, so that a disk that cannot take it is noticed
        early and its cost is known. None begins while one is being written.
        """
        due = self._due(step, repeated_fraction) if self._context.is_rank_zero else None
        return from_rank_zero(due)

    def begin(self, step: int, *, metrics: Mapping[str, float] | None = None, extra: Extra | None = None) -> None:
        """Copy the state after `step` out and write it in the background.

        An earlier save is completed first. A disk that refuses is logged, and the run goes on with what it has.
        """
        self.complete()
        start = time.monotonic()
        self._last_began = start
        try:
            draft = self._new_draft(step, extra)
            pending = self._trainer.begin_save(draft / TRAINER_STATE)
        except Overtaken:
            raise
        except RunError as error:
            self._failed(step, error)
            return
        self._writing = _Writing(step, draft, pending, dict(metrics or {}), start)
        self._writing.start()
        self._writing.stalled = time.monotonic() - start
        if not self._section.asynchronous:
            self.complete()

    def poll(self) -> int | None:
        """Commit the save in progress if every rank has written its part; returns its step when it was committed."""
        if self._writing is None:
            return None
        running = torch.tensor(int(self._writing.is_alive()))
        dist.all_reduce(running, dist.ReduceOp.MAX)
        return None if running else self._commit(time.monotonic())

    def complete(self) -> int | None:
        """Wait for the save in progress and commit it; returns its step when that succeeded."""
        if self._writing is None:
            return None
        start = time.monotonic()
        self._writing.join()
        return self._commit(start)

    def save_last(self, step: int, *, metrics: Mapping[str, float] | None = None, extra: Extra | None = None) -> bool:
        """Save the state after `step` before the process ends, if it is not saved and time suffices; whether it is."""
        self.complete()
        enough = from_rank_zero(self._time_for_a_save() if self._context.is_rank_zero else None)
        if step > self._saved_step and enough:
            self.begin(step, metrics=metrics, extra=extra)
            self.complete()
        return self._saved_step == step

    @property
    def saved_step(self) -> int:
        """The newest step whose state is on disk. Not collective."""
        return self._saved_step

    @property
    def oldest_step(self) -> int:
        """The oldest step whose checkpoint is kept; 0: none is. Not collective; rank 0."""
        return min(self._store.steps(), default=0)

    def _steps(self) -> list[int]:
        """The steps with a checkpoint, on every rank, after the leftovers of killed saves are gone."""
        steps = None
        with together(RunError):
            if self._context.is_rank_zero:
                self._store.clean()
                steps = self._store.steps()
        return from_rank_zero(steps)

    def _damage(self, step: int) -> list[str]:
        """What is wrong with a checkpoint; each rank looks at its share of the files."""
        mine: list[str] = []
        with together(RunError):
            mine = self._store.damage(step, share=(dist.get_rank(), dist.get_world_size()))
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        # A damaged manifest is seen by every rank.
        return list(dict.fromkeys(line for lines in everyone for line in lines))

    def _set_aside(self, damaged: dict[int, list[str]]) -> None:
        with together(RunError):
            for step, damage in damaged.items() if self._context.is_rank_zero else ():
                log.warning("checkpoint of step %d is damaged and set aside: %s", step, "; ".join(damage))
                self._store.set_aside(step, damage[0])

    def _all_damaged(self, damaged: dict[int, list[str]]) -> RunError:
        name = self._context.run_name
        lines = (f"  {self._store.path(step)}: {'; '.join(damage)}" for step, damage in damaged.items())
        return RunError(
            f"no checkpoint of '{self._context.name}' is intact:\n" + "\n".join(lines),
            fix=f"bring the files back from a copy, or give the trained steps up and begin again: "
            f"`miles resume {name} --stage {self._context.name} --from start`",
        )

    def _load(self, step: int) -> Restored:
        directory = self._store.path(step)
        manifest = self._store.read(step)
        start = time.monotonic()
        self._trainer.load_state(directory / TRAINER_STATE)
        _restore_rng(directory / "rng" / _rng_file(dist.get_rank()))
        self._saved_step = step
        self._save_seconds, self._stall_seconds = manifest.info.save_seconds, manifest.info.stall_seconds
        self._context.stop.last_save_seconds = manifest.info.save_seconds
        if self._context.is_rank_zero:
            log.info("checkpoint of step %d loaded in %.1f s: %s", step, time.monotonic() - start, directory)
        return Restored(step, directory)

    def _due(self, step: int, repeated_fraction: float) -> bool:
        if step == self._saved_step:
            return False
        if self._context.paths.save_request.exists():
            return True
        if self._section.every != "auto":
            return step % self._section.every == 0
        if self._writing is not None:
            return False
        if self._save_seconds is None:
            return True
        attempts = read_attempts(self._context.paths)
        mtbf = mean_time_between_failures(attempts, prior=3600 * self._section.mtbf_hours, now=time.time())
        return time.monotonic() - self._last_began >= save_interval(self._stall_seconds, mtbf, repeated_fraction)

    def _time_for_a_save(self) -> bool:
        expected = self._save_seconds or 0.0
        left = self._context.stop.seconds_left
        if 1.5 * expected < left:
            return True
        log.warning(
            "no time for a last save: it takes about %.0f s and %.0f s are left; the journal holds everything since"
            " step %d",
            *(expected, left, self._saved_step),
        )
        return False

    def _new_draft(self, step: int, extra: Extra | None) -> Path:
        """The directory to write into, on every rank. Raises RunError on every rank."""
        draft = None
        with together(RunError):
            if self._context.is_rank_zero:
                draft = self._store.draft(step)
                with disk_errors(draft):
                    (draft / TRAINER_STATE).mkdir()
                    (draft / "rng").mkdir()
                    if extra is not None:
                        extra(draft)
        return from_rank_zero(draft)

    def _commit(self, waiting_since: float) -> int | None:
        """Complete a save that every rank has written; returns its step, or None when it failed anywhere.

        `waiting_since`: when training last stood still for it, by the monotonic clock.
        """
        assert self._writing is not None
        writing, self._writing = self._writing, None
        try:
            writing.finalize()
            sums: list[dict[str, FileSum]] = [{}] * dist.get_world_size()
            dist.all_gather_object(sums, writing.sums)
            writing.stalled += time.monotonic() - waiting_since
            with together(RunError):
                if self._context.is_rank_zero:
                    self._commit_files(writing, {name: each for part in sums for name, each in part.items()})
        except Overtaken:
            raise
        except RunError as error:
            self._failed(writing.step, error)
            if self._context.is_rank_zero:
                self._store.abandon(writing.draft)
            return None
        self._saved_step = writing.step
        self._save_seconds, self._stall_seconds = time.monotonic() - writing.began, writing.stalled
        self._context.stop.last_save_seconds = self._save_seconds
        return writing.step

    def _commit_files(self, writing: _Writing, sums: dict[str, FileSum]) -> None:
        """Rank 0's part of a commit."""
        seconds = time.monotonic() - writing.began
        info = CheckpointInfo(
            stage=self._context.name,
            step=writing.step,
            attempt=self._context.attempt,
            created=time.time(),
            inputs=stage_fingerprint(self._context.paths, self._context.name),
            backend=self._backend,
            world_size=dist.get_world_size(),
            save_seconds=seconds,
            stall_seconds=writing.stalled,
            metrics=writing.metrics,
            trackers=tracker_ids(self._context.paths),
        )
        directory = self._store.commit(writing.draft, info, sums)
        log.info("saved step %d in %.1f s: %s", writing.step, seconds, directory)
        self._answer_request(writing)
        try:
            self._store.prune(self._section.keep_last, self._section.keep_every, self._section.keep_best)
        except Overtaken:
            raise
        except RunError as error:
            log.warning("older checkpoints stay for now: %s", error)

    def _answer_request(self, writing: _Writing) -> None:
        """Remove a request to save that was made before this save began; a later one wants a later state."""
        request = self._context.paths.save_request
        if request.exists() and request.stat().st_mtime <= writing.created:
            request.unlink(missing_ok=True)

    def _failed(self, step: int, error: Exception) -> None:
        """A failed save costs nothing but the time that a later failure will take to repeat."""
        self.failures += 1
        if self._context.is_rank_zero:
            log.error("the state after step %d could not be saved; the run goes on. %s", step, error)


class _Writing(Thread):
    """One save on its way to the disk: this rank's part of it."""

    def __init__(self, step: int, draft: Path, pending: PendingSave, metrics: dict[str, float], began: float) -> None:
        super().__init__(name=f"save-{step}", daemon=True)
        self.step = step
        self.draft = draft
        self.metrics = metrics
        self.began = began
        self.created = time.time()
        self.stalled = 0.0
        """Seconds for which training stood still."""
        self.sums: dict[str, FileSum] = {}
        self._pending = pending
        self._rng = _rng_states()
        self._error: Exception | None = None

    def run(self) -> None:
        rank = dist.get_rank()
        try:
            with disk_errors(self.draft):
                self._pending.write()
                # Through a file of Python's: torch's own writer turns the disk's errors into a RuntimeError.
                with (self.draft / "rng" / _rng_file(rank)).open("wb") as file:
                    torch.save(self._rng, file)
                own = [*self.draft.glob(f"{TRAINER_STATE}/__{rank}_*"), self.draft / "rng" / _rng_file(rank)]
                self.sums = sum_files(self.draft, [str(path.relative_to(self.draft)) for path in own])
        except Exception as error:
            # Whatever it was, the other ranks must hear of it before anybody acts on it.
            self._error = error

    def finalize(self) -> None:
        """Complete the trainer's files, once every rank has written. Collective; raises what stopped any rank."""
        raise_together(self._error)
        with disk_errors(self.draft):
            self._pending.finalize()


def _rng_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _rng_states() -> dict[str, Any]:
    """Every generator of this process. Training draws from none of them today: data, batches and samples are seeded by
    what they are. They are kept so that code which does draw resumes where it was.
    """
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": np.random.get_state(), "python": random.getstate()}


def _restore_rng(file: Path) -> None:
    """Set the generators; a rank that did not exist when the checkpoint was written keeps its fresh ones."""
    if not file.exists():
        return
    # The manifest's checksum says that we wrote this file; numpy's and Python's states are plain tuples.
    states = torch.load(file, weights_only=False)
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
