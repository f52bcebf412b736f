"""Writing the journal beside generation: every few seconds, in a thread, one write at a time.

Owns when a step is flushed; what a flush writes belongs to `miles.runs.journal`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from miles.data.sample import Group
from miles.rollout.responses import snapshot
from miles.runs.journal import Batch, Dropped, Journal


class Flusher:
    """Used on one event loop."""

    def __init__(self, journal: Journal, seconds: float) -> None:
        self._journal = journal
        self._seconds = seconds
        self._due = time.monotonic() + seconds
        self._writing: asyncio.Task[int] | None = None

    async def tick(self, step: int, groups: Iterable[Group], dropped: Sequence[Dropped]) -> None:
        """Begin a flush when one is due. Raises the RunError of the one before."""
        if self._writing is not None and self._writing.done():
            await self.settle()
        if self._writing is None and time.monotonic() >= self._due:
            self._begin(step, groups, dropped)

    async def flush(self, step: int, groups: Iterable[Group], dropped: Sequence[Dropped]) -> None:
        """Write now; returns when it is on the disk. Raises RunError."""
        await self.settle()
        self._begin(step, groups, dropped)
        await self.settle()

    async def commit(self, batch: Batch) -> None:
        """Write the decision of a step; returns when it is on the disk. Raises RunError."""
        await self.settle()
        await asyncio.to_thread(self._journal.commit, batch)

    async def settle(self) -> None:
        """Wait for the flush under way. Raises its RunError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def _begin(self, step: int, groups: Iterable[Group], dropped: Sequence[Dropped]) -> None:
        self._due = time.monotonic() + self._seconds
        # Lists are never changed in place (`miles.rollout.responses`): shallow copies stay as they are.
        begun = [snapshot(group) for group in groups if any(sample.response_tokens for sample in group.samples)]
        self._writing = asyncio.create_task(asyncio.to_thread(self._journal.flush, step, begun, list(dropped)))
