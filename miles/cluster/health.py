"""Waiting until inference servers answer."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable

from miles.cluster.ports import LOOPBACK

_REQUEST_SECONDS = 10.0
_PAUSE_SECONDS = 0.2


def answers(port: int, token: str) -> bool:
    """Whether the server on a port of this host is ready: GET /health_generate gives 200."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_REQUEST_SECONDS)
    try:
        connection.request("GET", "/health_generate", headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False  # not listening yet, or not answering in time: the caller's deadline decides
    finally:
        connection.close()


def wait_until_ready(ports: list[int], token: str, *, timeout: float, interrupted: Callable[[], None]) -> list[int]:
    """Ask all servers until each is ready or `timeout` seconds are over; returns the ports not ready.

    `interrupted` is called between requests and raises to stop waiting (a server died, a signal came).
    """
    deadline = time.monotonic() + timeout
    waiting = list(ports)
    while waiting and time.monotonic() < deadline:
        interrupted()
        waiting = [port for port in waiting if not answers(port, token)]
        if waiting:
            time.sleep(_PAUSE_SECONDS)
    return waiting
