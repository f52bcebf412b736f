"""When a server counts as this run's engine: it answers, and it takes the run's token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from miles.cluster.health import HealthWatch

TOKEN = "of this run"


@pytest.fixture
def server() -> Iterator[tuple[int, list[str]]]:
    """A server like an engine, whose health checks need no token: its port, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            welcome = self.path.startswith("/health") or self.headers["Authorization"] == f"Bearer {TOKEN}"
            asked.append(self.path)
            self.send_response(200 if welcome else 401)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_port, asked
        listening.shutdown()


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_server_that_takes_the_token_is_the_engine(server: tuple[int, list[str]]) -> None:
    port, asked = server
    watch = HealthWatch("127.0.0.1", port, TOKEN)
    wait_for(watch.take_answer)
    wait_for(watch.take_answer)
    watch.end()
    assert asked.count("/health_generate") == asked.count("/model_info") == 1


def test_engine_of_another_run_on_the_port_is_not_ours(server: tuple[int, list[str]]) -> None:
    port, asked = server
    watch = HealthWatch("127.0.0.1", port, "of another run")
    wait_for(lambda: asked.count("/model_info") >= 3)
    assert not watch.take_answer()
    watch.end()
