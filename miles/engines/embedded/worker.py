"""The engine's thread: it alone touches the model, and takes requests and commands from the HTTP server's event loop.

Owns the thread and its inbox. What a step does belongs to `scheduler`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from miles.engines.embedded.request import Request
from miles.engines.embedded.scheduler import Scheduler

logger = logging.getLogger(__name__)
T = TypeVar("T")


class EngineWorker:
    """Runs a scheduler on its own thread. Commands run between two forward passes."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.failure: BaseException | None = None
        self._on_failure: Callable[[BaseException], None] | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_failure: Callable[[BaseException], None]) -> None:
        """Begin; `on_failure` is called on the engine's thread if it dies."""
        self._on_failure = on_failure
        self._thread.start()

    def stop(self) -> None:
        """End after the pass that is running."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Queue a request; its `notify` is called on the engine's thread."""
        self._inbox.put(lambda: self.scheduler.add(request))

    def call(self, command: Callable[[Scheduler], T]) -> Future[T]:
        """Run `command` on the engine's thread; its result or exception comes through the future."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # who asked has gone
            try:
                future.set_result(command(self.scheduler))
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def _run(self) -> None:
        try:
            while self._drain():
                if not self.scheduler.idle:
                    self.scheduler.step()
        except Exception as error:
            # A pass that failed leaves cache and requests undefined; the server process ends with this message.
            logger.exception("the engine's thread failed")
            self.failure = error
            assert self._on_failure is not None
            self._on_failure(error)

    def _drain(self) -> bool:
        """Run what came in, waiting for something when there is nothing to step; False: asked to stop."""
        item: Any
        if self.scheduler.idle:
            item = self._inbox.get()
            if item is None:
                return False
            item()
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return False
            item()
        return True
