"""Being asked to stop. Handlers only set a flag, because signals arrive twice and at any time."""

from __future__ import annotations

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

# Launchers repeat a signal at once (Apptainer, srun); a person who asks again takes longer.
REPEAT_SECONDS = 0.5


class StopSignal:
    """Remembers the requests to stop that this process got."""

    def __init__(self, *, patient: bool = False) -> None:
        """`patient`: however often it is asked, it is not urgent. Slurm repeats its signals, and kills by itself."""
        self._patient = patient
        self._first: float | None = None
        self.warned = False
        """The first request was a warning, which the batch script hands on, and no SIGTERM of Slurm's own."""
        self.urgent = False
        """Asked a second time: end everything without waiting."""

    def listen(self) -> None:
        """Install the handlers. Call it in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def ignore(self) -> None:
        """From now on nothing of it matters. Python drops handlers while it ends: a repeated signal would kill it then,
        and its exit code would be another.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @property
    def requested(self) -> bool:
        return self._first is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self.warned = number in (signal.SIGUSR1, signal.SIGUSR2)
        elif now - self._first > REPEAT_SECONDS and not self._patient:
            self.urgent = True
