"""The checkpoints of a stage on disk: each is there completely, or not at all.

A checkpoint is built under a hidden name, flushed, and renamed to `checkpoints/<stage>/step-000040`; the directory
with the highest number is the newest, and no other file says so. Owns these directories, their verification and their
retention. What is in the files, and when they are written, belongs to `miles.training.checkpointing`.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from miles.errors import RunError
from miles.runs.claim import Fence
from miles.runs.files import disk_errors, sync_directory, write_new
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
from miles.runs.paths import RunPaths

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{6,})")
_HIDDEN = re.compile(r"\.(draft|removed|replaced)-(\d{6,})-\d+")


class CheckpointStore:
    """The checkpoints of one stage. One process changes them at a time: rank 0 of the attempt that the fence names."""

    def __init__(self, paths: RunPaths, stage: str, fence: Fence) -> None:
        self._root = paths.root
        self._directory = paths.checkpoints(stage)
        self._stage = stage
        self._fence = fence

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or would lie."""
        return self._directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps with a checkpoint, intact or damaged, ascending."""
        found = (_STEP.fullmatch(path.name) for path in self._directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def read(self, step: int) -> Manifest:
        """The manifest of a checkpoint. Raises DamagedError, and RunError when a newer Miles wrote it."""
        return read_manifest(self.path(step))

    def require(self, step: int) -> Manifest:
        """The manifest of a checkpoint that a person named.

        Raises RunError with the nearest ones when there is none, and DamagedError when a file is missing or has
        another size. Contents are not read: that is done when the checkpoint is loaded.
        """
        if step not in self.steps():
            raise self._no_such(step)
        damage = self.damage(step, contents=False)
        if damage:
            raise DamagedError(
                f"the checkpoint of step {step} is damaged: {'; '.join(damage)}", fix="choose an earlier one"
            )
        return self.read(step)

    def damage(self, step: int, *, share: tuple[int, int] = (0, 1), contents: bool = True) -> list[str]:
        """What is wrong with a checkpoint, a line for each file by its path in it; empty: it is as it was written.

        `share` is (rank, ranks): each looks at its part of the files, and all at the manifest. `contents=False` looks
        at sizes only. Raises RunError when a file cannot be judged, or a newer Miles wrote it.
        """
        try:
            files = self.read(step).files
        except DamagedError as error:
            return [error.message.removeprefix(f"{self.path(step)}{os.sep}")]
        rank, ranks = share
        by_size = sorted(files, key=lambda name: (-files[name].size, name))
        damage = []
        for name in sorted(by_size[rank::ranks]):
            what = file_damage(self.path(step) / name, files[name], contents=contents)
            if what is not None:
                damage.append(f"{name}: {what}")
        return damage

    def draft(self, step: int) -> Path:
        """A new empty directory to build the checkpoint of a step in. Raises RunError."""
        self._fence.check()
        draft = self._hidden("draft", step)
        with disk_errors(draft):
            draft.mkdir(parents=True)
        return draft

    def commit(self, draft: Path, info: CheckpointInfo, sums: Mapping[str, FileSum]) -> Path:
        """Make a draft the checkpoint of its step; returns its directory.

        `sums` are from `sum_files`, by the ranks that wrote the files; files that it does not name are flushed and
        hashed here. A checkpoint that this step had is replaced: a crash at any instant leaves the old one or the new
        one. Raises RunError, and Overtaken when another attempt drives the run; the draft is then still there.
        """
        with disk_errors(draft):
            files = _complete(draft, sums)
            write_new(draft / MANIFEST, encode(Manifest(info, files)).decode())
            _sync_tree(draft)
        self._place(draft, info.step)
        return self.path(info.step)

    def copy(self, other: CheckpointStore, step: int) -> Path:
        """Copy a checkpoint of another run: by hard links where the disk has them, for no file is ever changed."""
        manifest = other.require(step)
        draft = self.draft(step)
        try:
            with disk_errors(draft):
                for name in (*manifest.files, MANIFEST):
                    target = draft / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _link_or_copy(other.path(step) / name, target)
                _sync_tree(draft)
            self._place(draft, step)
        except RunError:
            self.abandon(draft)
            raise
        return self.path(step)

    def abandon(self, draft: Path) -> None:
        """Remove a draft that will not be committed."""
        _remove(draft)

    def clean(self) -> None:
        """Finish what a killed attempt left: remove its drafts, complete its removals, undo a replacement half done."""
        self._fence.check()
        for path in sorted(self._directory.glob(".*")):
            match = _HIDDEN.fullmatch(path.name)
            if match is None:
                continue
            final = self.path(int(match[2]))
            if match[1] == "replaced" and not final.exists():
                with disk_errors(final):
                    path.rename(final)
                    sync_directory(self._directory)
            else:
                _remove(path)

    def set_aside(self, step: int, why: str) -> Path:
        """Rename a damaged checkpoint to `damaged-000040-1`, out of the way of `steps`; returns the new path."""
        self._fence.check()
        number = 1
        while (aside := self._directory / f"damaged-{step:06d}-{number}").exists():
            number += 1
        with disk_errors(aside):
            self.path(step).rename(aside)
            sync_directory(self._directory)
        try:
            with disk_errors(aside):
                write_new(aside / "why.txt", why + "\n")
        except RunError as error:
            log.warning("the reason is not beside the damaged checkpoint: %s", error)
        return aside

    def prune(self, keep_last: int, keep_every: int, keep_best: str | None) -> list[int]:
        """Remove what the retention of `steps_to_keep` does not keep; returns the steps removed, ascending.

        A checkpoint whose manifest is damaged counts for nothing and is left alone.
        """
        self._fence.check()
        values: dict[int, float | None] = {}
        for step in self.steps():
            try:
                metrics = self.read(step).info.metrics
            except DamagedError as error:
                log.warning("not pruned: %s", error)
                continue
            values[step] = metrics.get(keep_best) if keep_best is not None else None
        unwanted = sorted(values.keys() - steps_to_keep(values, keep_last, keep_every))
        with disk_errors(self._directory):
            hidden = [self.path(step).rename(self._hidden("removed", step)) for step in unwanted]
            if hidden:
                sync_directory(self._directory)
        for path in hidden:
            _remove(path)
        return unwanted

    def _no_such(self, step: int) -> RunError:
        steps = self.steps()
        near = [max((s for s in steps if s < step), default=None), min((s for s in steps if s > step), default=None)]
        named = " and ".join(f"step {s}" for s in near if s is not None)
        return RunError(
            f"'{self._stage}' has no checkpoint of step {step}"
            + (f"; the nearest: {named}" if named else f": {self._directory} holds none"),
            fix=f"choose one of {', '.join(map(str, steps))}" if steps else "`miles save` makes a running one save",
        )

    def _hidden(self, purpose: str, step: int) -> Path:
        return self._directory / f".{purpose}-{step:06d}-{time.time_ns()}"

    def _place(self, draft: Path, step: int) -> None:
        """Rename a flushed draft into place. No system call swaps directories on every file system, so one that is
        there steps aside first, and `clean` brings it back when nothing came after it.
        """
        final, replaced = self.path(step), self._hidden("replaced", step)
        self._fence.check()
        with disk_errors(final):
            there = final.exists()
            if there:
                final.rename(replaced)
            try:
                draft.rename(final)
            except OSError:
                if there:
                    replaced.rename(final)
                raise
            for directory in (self._directory, self._directory.parent, self._root):
                sync_directory(directory)
        if there:
            log.info("the checkpoint of step %d was there already and is replaced: %s", step, final)
            _remove(replaced)


def steps_to_keep(values: Mapping[int, float | None], keep_last: int, keep_every: int) -> set[int]:
    """The steps that retention keeps: the newest `keep_last`, the multiples of `keep_every` (0: none), and the best.

    `values` has every step's value of the metric that says which is best, None where it has none. NaN is no value;
    of equals, the newest is best.
    """
    assert keep_last >= 1 and keep_every >= 0
    kept = set(sorted(values)[-keep_last:])
    if keep_every:
        kept |= {step for step in values if step % keep_every == 0}
    ranked = [(value, step) for step, value in values.items() if value is not None and not math.isnan(value)]
    if ranked:
        kept.add(max(ranked)[1])
    return kept


def _complete(draft: Path, sums: Mapping[str, FileSum]) -> dict[str, FileSum]:
    """Sums of all files of a draft. Raises RunError when a file that a rank wrote is not there as it was."""
    sizes = {str(path.relative_to(draft)): path.stat().st_size for path in draft.rglob("*") if path.is_file()}
    for name, expected in sums.items():
        if sizes.get(name) != expected.size:
            found = "is missing" if name not in sizes else f"has {sizes[name]} bytes"
            raise RunError(
                f"{draft / name} {found}, and the rank that wrote it says {expected.size} bytes",
                fix="put the run on a file system that all nodes share (runs_dir)",
            )
    return sum_files(draft, sorted(sizes.keys() - sums.keys())) | dict(sums)


def _sync_tree(directory: Path) -> None:
    """Flush a directory and all below it, the deepest first; the files are flushed already."""
    for parent, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(parent))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as refused:
        # Another file system, one without hard links, or too many of them; a real fault shows itself in the copy too.
        log.debug("copied, for it cannot be linked: %s", refused)
        shutil.copyfile(source, target)
        sum_files(target.parent, [target.name])


def _remove(directory: Path) -> None:
    """Delete a hidden directory. What cannot be deleted costs space and nothing else; `clean` tries again."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        log.warning("%s could not be removed: %s", directory, error)
