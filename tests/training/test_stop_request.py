"""When an attempt decides to end: signals and deadlines, in a process of its own (handlers are per process)."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, time
from miles.training.distributed import END_MARGIN_SECONDS, StopRequest
{body}
"""


def run(body: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_asks_to_stop_and_leaves_the_grace(name: str) -> None:
    body = f"""
stop = StopRequest.from_environment()
before = stop.requested
os.kill(os.getpid(), signal.{name})
print(before, stop.requested, 25 < stop.seconds_left <= 30)
"""
    assert run(body, MILES_GRACE_SECONDS="30") == ["False", "True", "True"]


def test_a_second_signal_does_not_lengthen_the_grace() -> None:
    body = """
stop = StopRequest(grace_seconds=30)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGUSR2)
print(stop.seconds_left < 29.9)
"""
    assert run(body) == ["True"]


def test_a_deadline_leaves_room_for_the_last_save() -> None:
    body = """
for left in (1000.0, 5.0, 60.0):
    stop = StopRequest(deadline=time.time() + left)
    print(stop.requested)
stop.last_save_seconds = 40.0
print(stop.requested)
"""
    assert run(body) == ["False", "True", "False", "True"]


def test_without_a_deadline_time_does_not_end() -> None:
    assert run("stop = StopRequest.from_environment(); print(stop.requested, stop.seconds_left)") == ["False", "inf"]


def test_sigusr1_leaves_the_time_until_a_known_deadline() -> None:
    body = """
stop = StopRequest(deadline=time.time() + 300, grace_seconds=30)
os.kill(os.getpid(), signal.SIGUSR1)
print(stop.requested, stop.seconds_left > 290)
os.kill(os.getpid(), signal.SIGTERM)
print(stop.seconds_left > 290)
"""
    assert run(body) == ["True", "True", "True"]
