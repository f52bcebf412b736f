"""A real embedded engine in a process of its own, for tests that need engines but no run."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from miles.cluster.ports import choose_ports
from miles.runs.endpoints import Endpoint, write_endpoints

TOKEN = "test-token"
SERVER = """
import sys, torch
from pathlib import Path
from miles.engines.embedded.launch import EmbeddedOptions, serve_embedded
torch.set_num_threads(1)
model = Path(sys.argv[1])
serve_embedded(EmbeddedOptions(model=model, tokenizer=model, dtype=torch.float32, host="127.0.0.1",
    port=int(sys.argv[2]), token=sys.argv[3], context_length=None, max_running_requests=32))
"""


@dataclass
class EngineProcess:
    """One server process."""

    process: subprocess.Popen[bytes]
    url: str

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def wait_ready(self) -> None:
        """Return when it generates."""
        deadline = time.monotonic() + 120
        while not self._ready():
            assert time.monotonic() < deadline, "the engine did not start"
            assert self.process.poll() is None, "the engine ended"
            time.sleep(0.1)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        try:
            connection.request("GET", "/health_generate")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def start_engine(model: Path, port: int) -> EngineProcess:
    """An engine that is not ready yet; kill it in the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, "-c", SERVER, str(model), str(port), TOKEN]
    return EngineProcess(subprocess.Popen(command, env=environment), f"http://127.0.0.1:{port}")


@contextmanager
def engine_processes(model: Path, count: int) -> Iterator[list[EngineProcess]]:
    """Engines that are ready; killed at the end."""
    engines: list[EngineProcess] = []
    try:
        for port in choose_ports(count, seed=os.getpid()):
            engines.append(start_engine(model, port))
        for engine in engines:
            engine.wait_ready()
        yield engines
    finally:
        for engine in engines:
            engine.kill()


def list_engines(file: Path, engines: Sequence[EngineProcess], *, starts: Sequence[int] | None = None) -> None:
    """Write the file that tells clients of these engines."""
    numbers = starts or [1] * len(engines)
    endpoints = [
        Endpoint(index, engine.url, start, ready=engine.process.poll() is None)
        for index, (engine, start) in enumerate(zip(engines, numbers, strict=True))
    ]
    write_endpoints(file, endpoints)
