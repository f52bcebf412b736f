"""`Journal`: the rollout journal of one stage, as its only writer sees it.

    journal/grpo/step-000041/segment-000001-<xxh3>.h5     what was new at each flush, while the step is open
    journal/grpo/step-000041/batch-000001-<xxh3>.h5       the decision, which replaces the segments

Owns when what is written, kept and set aside. Formats belong to `miles.runs.journal.codec`, bytes on the disk to
`miles.runs.journal.files`.

**What is on disk, and how a writer knows.** A journal remembers a mark per sample (`miles.runs.journal.deltas`): what
the segments of the open step hold of it. The marks are taken from the disk when a journal first touches a step, so an
attempt that continues a step writes on where the last one stopped, whether or not it asked `read_open`. They move only
when a segment is in place, so what a failed flush did not write, the next one does. A sample that does not continue
its mark (it was begun anew) is written again from its start, and that replaces what was there.

A group carried over from the batch before is written once more, whole, when it is first flushed in a step and has
changed since that batch: the segments of a step can be read without any other file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from miles.data.sample import Group, Prompt
from miles.runs.claim import Fence
from miles.runs.files import disk_errors
from miles.runs.journal.codec import Content, batch_content, content_batch, decode, encode, prompt_finder
from miles.runs.journal.deltas import FindPrompt, Mark, Opening, Replay, SampleDelta, delta_since
from miles.runs.journal.files import (
    JournalFile,
    list_files,
    move_steps,
    newest_batch,
    read_file,
    remove_files,
    remove_leftovers,
    remove_step,
    set_aside,
    step_directories,
    step_directory,
    superseded,
    write_file,
)
from miles.runs.journal.records import Batch, Dropped, OpenStep
from miles.runs.manifest import DamagedError
from miles.runs.paths import RunPaths

log = logging.getLogger(__name__)

GroupMarks = dict[int, Mark]
"""By sample index."""


@dataclass(slots=True)
class _Written:
    """What the segments of the open step hold."""

    step: int
    last_number: int
    """Of its segments, the damaged ones too."""
    groups: dict[int, GroupMarks]
    """By position."""
    dropped: set[int] = field(default_factory=set)


class Journal:
    """Reads and writes the journal of one stage. One process does, which the fence sees to."""

    def __init__(self, paths: RunPaths, stage: str, fence: Fence, prompts: Mapping[str, Prompt]) -> None:
        self._directory = paths.journal(stage)
        self._discarded = paths.discarded
        self._stage = stage
        self._fence = fence
        self._find: FindPrompt = prompt_finder(prompts)
        self._written: _Written | None = None
        self._carried: tuple[int, dict[int, GroupMarks]] = (-1, {})
        """The step of the batch last read or written, and marks of what it carries."""
        self._tidy = False

    def flush(self, step: int, groups: Sequence[Group], dropped: Sequence[Dropped] = ()) -> int:
        """Write what is new in the groups as one segment; returns its bytes, 0 when nothing changed.

        The groups may be all of the step or those that changed, `dropped` all or the new ones. Nobody may change them
        meanwhile. Raises RunError when the disk refuses (the next flush repeats it) or the run was taken over.
        """
        written = self._open(step)
        content, marks = self._news(written, groups, dropped)
        if not (content.openings or content.deltas or content.dropped):
            return 0
        self._clean()
        data = encode(content)
        # A number is used once, also by a flush that fails: it may be on the disk nevertheless.
        written.last_number += 1
        write_file(step_directory(self._directory, step), "segment", written.last_number, data, self._fence)
        written.groups |= marks
        written.dropped |= {each.position for each in content.dropped}
        return len(data)

    def commit(self, batch: Batch) -> int:
        """Write the decision of a step, then remove its segments; returns the bytes of the batch.

        One that the step already had is replaced: at any instant the old or the new one counts. Raises as `flush`.
        """
        self._clean()
        directory = step_directory(self._directory, batch.step)
        number = max((file.number for file in list_files(directory, "batch")), default=0) + 1
        data = encode(batch_content(batch))
        file = write_file(directory, "batch", number, data, self._fence)
        remove_files(superseded(directory, file))
        self._written = None
        self._remember(batch)
        return len(data)

    def read_batch(self, step: int) -> Batch | None:
        """The decision of a step; None when there is none or it is damaged, which is logged, and the file set aside.

        Raises DataError when a prompt is not in the data any more, RunError when a newer Miles wrote the file.
        """
        file = newest_batch(step_directory(self._directory, step))
        if file is None or (content := self._read(file)) is None:
            return None
        batch = content_batch(content, self._find)
        self._remember(batch)
        return batch

    def read_open(self, step: int) -> OpenStep:
        """What the segments of a step without a batch hold. Damaged ones are logged and set aside; what follows a gap
        in a sample is left out, and will be generated again. Raises as `read_batch`.
        """
        directory = step_directory(self._directory, step)
        segments = list_files(directory, "segment")
        last_number = max((file.number for file in segments), default=0)
        replay, dropped = Replay(self._find), dict[int, Dropped]()
        if newest_batch(directory) is None:
            for file in segments:
                if file.damaged or (content := self._read(file)) is None:
                    continue
                replay_segment(replay, content)
                dropped |= {each.position: each for each in content.dropped}
        groups = sorted((group for _, group in replay.finish()), key=lambda group: group.position)
        self._written = _Written(step, last_number, {g.position: _marks(g) for g in groups}, set(dropped))
        return OpenStep(groups, [dropped[position] for position in sorted(dropped)])

    def steps(self) -> list[int]:
        """Steps with a decision, ascending; its file is not read."""
        directories = step_directories(self._directory)
        return [step for step, directory in directories.items() if newest_batch(directory) is not None]

    def prune(self, first_needed_step: int) -> list[int]:
        """Remove the steps before `first_needed_step`; returns them."""
        self._fence.check()
        steps = {step: path for step, path in step_directories(self._directory).items() if step < first_needed_step}
        for path in steps.values():
            remove_step(path)
        return list(steps)

    def discard_from(self, step: int, why: str) -> list[int]:
        """Move this step and all later ones to `discarded/<stage>-<n>/journal`; returns them. Nothing is deleted."""
        steps = {number: path for number, path in step_directories(self._directory).items() if number >= step}
        if not steps:
            return []
        self._fence.check()
        aside = self._unused()
        log.warning("journal of steps %s: %s; moved to %s", ", ".join(map(str, steps)), why, aside)
        move_steps(list(steps.values()), aside, why)
        if self._written is not None and self._written.step >= step:
            self._written = None
        return list(steps)

    def _open(self, step: int) -> _Written:
        if self._written is None or self._written.step != step:
            self.read_open(step)
        assert self._written is not None
        return self._written

    def _news(
        self, written: _Written, groups: Sequence[Group], dropped: Sequence[Dropped]
    ) -> tuple[Content, dict[int, GroupMarks]]:
        """The next segment, and what is known once it is written."""
        openings: list[Opening] = []
        deltas: list[SampleDelta] = []
        marks: dict[int, GroupMarks] = {}
        for group in groups:
            now, known = _marks(group), written.groups.get(group.position)
            if now == (self._carried_marks(written.step, group.position) if known is None else known):
                continue
            if known is None:
                openings.append(Opening.of(group))
                known = {}
            for sample in group.samples:
                if (mark := known.get(sample.index)) != now[sample.index]:
                    deltas.append(delta_since(mark, group.position, sample))
            marks[group.position] = now
        new = [each for each in dropped if each.position not in written.dropped]
        return Content(written.step, openings, deltas, new), marks

    def _carried_marks(self, step: int, position: int) -> GroupMarks | None:
        batch_step, carried = self._carried
        return carried.get(position) if batch_step == step - 1 else None

    def _remember(self, batch: Batch) -> None:
        self._carried = batch.step, {group.position: _marks(group) for group in batch.carried}

    def _read(self, file: JournalFile) -> Content | None:
        """A file's content; None when it is damaged, which is logged and seen to."""
        try:
            return decode(read_file(file), str(file.path))
        except DamagedError as error:
            set_aside(file, error, self._fence)
            return None

    def _clean(self) -> None:
        """Before this journal's first write: what killed attempts left."""
        if not self._tidy:
            self._fence.check()
            remove_leftovers(self._directory)
            self._tidy = True

    def _unused(self) -> Path:
        number = 1
        with disk_errors(self._discarded, "read"):
            while (aside := self._discarded / f"{self._stage}-{number}").exists():
                number += 1
        return aside / "journal"


def replay_segment(replay: Replay, content: Content) -> None:
    """Add what a segment holds."""
    for opening in content.openings:
        replay.open(opening)
    for delta in content.deltas:
        replay.apply(delta)


def _marks(group: Group) -> GroupMarks:
    return {sample.index: Mark.of(sample) for sample in group.samples}
