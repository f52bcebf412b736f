"""Asking an inference server, again and again and beside everything else, whether it answers."""

from __future__ import annotations

import http.client
from threading import Event, Thread
from typing import Literal

Route = Literal["/health", "/health_generate", "/model_info"]

_REQUEST_SECONDS = 30.0
"""Longer than a busy server holds a request back before it says that it is busy."""
_PAUSE_SECONDS = 0.2


class HealthWatch:
    """Asks one server of this node in a thread of its own, so that a server that is slow to answer delays nobody.

    Until the first answer it asks for a token (`/health_generate`), which a server that still loads cannot give; then
    only whether the server answers (`/health`), which it does while it is busy or its memory is released. Neither needs
    the run's token: before the first answer counts, the server must have taken it (`/model_info`), because a server of
    another run may have come to this port first.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        self._host = host
        self._port = port
        self._token = token
        self._answered = Event()
        self._ended = Event()
        Thread(target=self._ask, name=f"health-{port}", daemon=True).start()

    def take_answer(self) -> bool:
        """Whether the server has answered since the last call."""
        answered = self._answered.is_set()
        self._answered.clear()
        return answered

    def end(self) -> None:
        """Ask no more. Returns at once; a request on its way is forgotten."""
        self._ended.set()

    def _ask(self) -> None:
        ours = False
        while not self._ended.is_set():
            ours = ours or (self._answers("/health_generate") and self._answers("/model_info"))
            if ours and self._answers("/health"):
                self._answered.set()
            self._ended.wait(_PAUSE_SECONDS)

    def _answers(self, route: Route) -> bool:
        return answers(self._host, self._port, self._token, route)


def answers(host: str, port: int, token: str, route: Route) -> bool:
    """Whether the server on a port answers a GET request with 200."""
    connection = http.client.HTTPConnection(host, port, timeout=_REQUEST_SECONDS)
    try:
        connection.request("GET", route, headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False  # not listening yet, or not answering in time: who watches decides how long that may last
    finally:
        connection.close()
