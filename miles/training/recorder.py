"""What a step on ranks leaves behind while it runs: progress, metrics, trackers, transcripts. Rank 0 writes.

Owns no numbers: the loop hands them over.
"""

from __future__ import annotations

from miles.config.schema import TrackingSection
from miles.data.sample import Group
from miles.runs.metrics import MetricsWriter, drop_stage, last_step
from miles.runs.progress import Progress, write_progress
from miles.runs.samples import SampleRecord, write_samples
from miles.runs.trackers import Trackers
from miles.training.context import Context


class Recorder:
    """Writes for rank 0 and does nothing on the others."""

    def __init__(self, context: Context, *, kind: str, steps: int, tracking: TrackingSection) -> None:
        self._context = context
        self._kind = kind
        self._steps = steps
        self._samples_per_step = tracking.samples_per_step
        self._active = context.is_rank_zero
        self._recorded = -1
        if self._active:
            last = last_step(context.paths, context.name)
            self._recorded = -1 if last is None else last
            self._metrics = MetricsWriter(context.paths)
            self._trackers = Trackers(context.paths, tracking, context.run_name)

    def progress(self, step: int, phase: str, done: int = 0, total: int = 0) -> None:
        """Say what is being done right now, for the live view."""
        if self._active:
            name = self._context.name
            write_progress(self._context.paths, Progress(name, self._kind, step, self._steps, phase, done, total))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of one training step (0: before the first), once: a step that an earlier attempt recorded
        keeps its line."""
        if self._active and step > self._recorded:
            self._recorded = step
            self._metrics.write(self._context.name, step, values)
            self._trackers.log(self._context.name, step, values)

    @property
    def recorded(self) -> int:
        """The last step that has its line of metrics; -1: none. Only rank 0 knows."""
        return self._recorded

    def forget(self, after: int) -> None:
        """Drop the lines of later steps, which are going to be done again with other responses."""
        if self._active and self._recorded > after:
            drop_stage(self._context.paths, self._context.name, after=after)
            self._recorded = after

    def samples(self, step: int, groups: list[Group]) -> None:
        """Keep the transcripts of the first sample of each of the first few groups."""
        if self._active and self._samples_per_step and step > self._recorded:
            records = [_transcript(group) for group in groups[: self._samples_per_step]]
            write_samples(self._context.paths, self._context.name, step, records)

    def close(self) -> None:
        """End the trackers' uploads."""
        if self._active:
            self._trackers.close()


def _transcript(group: Group) -> SampleRecord:
    sample = group.samples[0]
    return SampleRecord(
        prompt=group.prompt.text,
        response=sample.text,
        label=group.prompt.label,
        reward=sample.reward,
        reward_parts=sample.reward_parts,
        finish_reason=sample.finish_reason,
        length=len(sample.response_tokens),
    )
