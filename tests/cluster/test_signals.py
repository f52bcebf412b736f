import os
import signal
import time
from collections.abc import Iterator

import pytest

from miles.cluster.signals import REPEAT_SECONDS, STOP_SIGNALS, StopSignal


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = StopSignal()
    stop.listen()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_is_remembered(stop: StopSignal, number: signal.Signals) -> None:
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested
    assert stop.warned == (number in (signal.SIGUSR1, signal.SIGUSR2))
    assert not stop.urgent


def test_repetition_at_once_is_the_same_request_and_a_later_one_is_urgent(stop: StopSignal) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not stop.urgent
    time.sleep(REPEAT_SECONDS + 0.05)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.urgent
