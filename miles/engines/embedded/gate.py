"""Who may be in the engine at a time: generation requests together, or one weight update alone.

SGLang's rules: a pause holds new requests back; an update waits for running requests and holds new ones back, except
during a pause, when it takes place at once among requests that are held.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Used on one event loop."""

    def __init__(self) -> None:
        self.paused = False
        self._inside = 0
        self._updates = 0
        self._changed = asyncio.Condition()

    @property
    def inside(self) -> int:
        """Generation requests that were let in and have not left."""
        return self._inside

    @asynccontextmanager
    async def generating(self) -> AsyncIterator[None]:
        """A generation request."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self.paused and not self._updates)
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def updating(self) -> AsyncIterator[None]:
        """A weight update."""
        async with self._changed:
            self._updates += 1
            await self._changed.wait_for(lambda: self.paused or not self._inside)
        try:
            yield
        finally:
            async with self._changed:
                self._updates -= 1
                self._changed.notify_all()

    async def set_paused(self, paused: bool) -> None:
        """Pause or continue."""
        async with self._changed:
            self.paused = paused
            self._changed.notify_all()

    async def empty(self) -> None:
        """Wait until every generation request has left."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._inside)
